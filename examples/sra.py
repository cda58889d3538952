"""Trains a small model on emoji with SRA: it follows its own average, which sees less noise; no encoder is needed.

python examples/sra.py [steps]
"""

import sys

import torch

from smalti.backbones.dit import DiT
from smalti.data.emoji import STYLES, load_emoji
from smalti.data.packages import cache_folder
from smalti.evaluation.feature_map import feature_pictures, feature_sheet
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji import latent_source
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.config import TrainConfig
from smalti.training.progress import read_log
from smalti.training.sra import DEVIATION, SelfAlignment, SRASettings
from smalti.training.stopping import StopOnCollapse
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
cache, autoencoder = cache_folder() / "examples", load_model("emoji").autoencoder
pictures = load_emoji("train", styles=["noto"], topics=["hearts", "clocks"])
source = latent_source(autoencoder, pictures, EmbeddingCache(MiniLMEncoder(length=16), cache), STYLES, cache)

torch.manual_seed(0)
model = DiT(in_channels=16, patch_size=1, depth=6, heads=4, head_dim=32, num_labels=len(STYLES), pooled_dim=384)
term = SelfAlignment(128, SRASettings(student=2, teacher=4, start=steps // 10))
guard = StopOnCollapse(("sra",), DEVIATION)  # ends the term if all features become alike
config = TrainConfig(steps=steps, batch=32, learning_rate=2e-3, ema=0.99, log_every=max(1, steps // 10))
trainer = Trainer(model, FlowMatching(), source, config, "sra-run", losses=[term], stops=[guard])
for line in read_log(trainer.fit().curve):
    print(f"step {line['step']}: objective {line['objective']:.3f}, distance {line.get('self distance', 'off')}")

batch = source.batch(torch.arange(4), [torch.Generator().manual_seed(k) for k in range(4)])
feature_sheet(feature_pictures(trainer.ema_model, batch, depths=[2, 4], times=[0.3, 0.6])).save("features.png")
