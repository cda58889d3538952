"""Trains a model with a wide head in the latents of a representation autoencoder, and draws with autoguidance.

python examples/rae.py [steps]
"""

import sys
from typing import Any

import torch

from smalti.backbones.dit_dh import DiTDH
from smalti.core.protocols import Cond, Latents
from smalti.data.emoji import STYLES, load_emoji
from smalti.evaluation.reconstruction import reconstruction_report
from smalti.evaluation.sheet import sheet, to_images
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.time_sampling import dimension_shift
from smalti.sampling.guidance import Autoguidance
from smalti.sampling.loop import sample
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import Euler
from smalti.tokenizers.rae import RAE
from smalti.training.config import TrainConfig
from smalti.training.latent_source import LatentSource
from smalti.training.trainer import Trainer
from smalti.zoo.loader import ZOO, load_part

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
rae = load_part(ZOO / "rae-emoji", RAE)  # for other pictures train a decoder on them: see recipes/rae_emoji.py
pictures = load_emoji("train", topics=["hearts"])
report = reconstruction_report(rae, pictures, range(32))
print(f"reconstruction: PSNR {report['PSNR']:.1f} dB, rFD {report['rFD-EfficientNetLite0']:.0f}")
latents: Any = rae.encode(pictures.pixels()).tensor  # (S, 192, 8, 8)
styles = torch.tensor([STYLES.index(one.style) for one in pictures.items])
source = LatentSource([latents], labels=styles, dropped_label=4)
shift = dimension_shift(latents.shape[1:])  # of training and of sampling


def trained(steps, **shape):
    model = DiTDH(in_channels=192, num_labels=4, base_size=8, **shape)
    trainer = Trainer(model, FlowMatching(shift=shift), source, TrainConfig(steps, 16), f"rae-run/{steps}")
    print(f"loss after {steps} steps: {trainer.fit().loss:.3f}")
    return trainer.ema_model.eval()


strong = trained(steps, width=(64, 256), depth=(4, 2), heads=(2, 8))
weak = trained(max(1, steps // 4), width=(32, 192), depth=(2, 1), heads=(1, 6))
guided, noise = Autoguidance(weak, 1.42).around(strong), torch.randn(4, 192, 8, 8)
with torch.no_grad():
    x = sample(guided, noise, uniform_schedule(25, shift), Euler(), cond=Cond(label=torch.arange(4))).x
sheet(to_images(rae.decode(Latents(x))), list(STYLES)).save("rae.png")
