"""Trains a small flow on latents of emoji, teaches it inpainting, and fills hidden parts of pictures it never saw.

python examples/lfm.py [steps]
"""

import sys

import torch

from smalti.backbones.dit import DiT
from smalti.control.channel_concat import ChannelConcat, InpaintChannels
from smalti.core.protocols import Cond, Latents
from smalti.core.seeds import generators_for, randn
from smalti.data.emoji import load_emoji
from smalti.data.masks import draw_masks, hide
from smalti.evaluation.sheet import sheet, to_images
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.time_sampling import Uniform
from smalti.sampling.dopri5 import Dopri5, effort
from smalti.sampling.keep_known import paste
from smalti.sampling.loop import sample
from smalti.training.config import TrainConfig
from smalti.training.encoded_source import EncodedSource
from smalti.training.inpaint_source import InpaintSource, inpaint_extra
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
autoencoder, objective = load_model("emoji").autoencoder, FlowMatching(Uniform(), floor=1e-5)
source = EncodedSource(load_emoji("train", styles=["noto"]), autoencoder)
config = TrainConfig(steps=steps, batch=32, learning_rate=2e-3, ema=0.99)

torch.manual_seed(0)
model = DiT(in_channels=16, patch_size=1, depth=6, heads=3, head_dim=32, base_size=8)
Trainer(model, objective, source, config, "flow").fit()
trainer = Trainer(ChannelConcat(model, [InpaintChannels(16)]), objective, InpaintSource(source), config, "inpainting")
print("loss", trainer.fit().loss)

pixels = load_emoji("held-out", styles=["noto"]).pixels(range(4))
mask = draw_masks(pixels.shape[-2:], generators_for(range(4)), 4)
cond = Cond(extra=inpaint_extra(autoencoder, pixels, mask))
with torch.no_grad():
    state = sample(trainer.ema_model, randn((4, 16, 8, 8), generators_for(range(4))), [1.0, 0.0], Dopri5(), cond=cond)
filled = paste(autoencoder.decode(Latents(state.x)), pixels, mask)
print("calls of the model", int(effort(state).calls[0]))
sheet(to_images(torch.cat([hide(pixels, mask), filled])), ["given"] * 4 + ["filled"] * 4, columns=4).save("lfm.png")
