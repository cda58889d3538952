"""Trains a small model on emoji with REPA: its hidden states learn from a frozen encoder of clean pictures.

python examples/repa.py [steps]
"""

import sys
from dataclasses import replace

import torch

from smalti.backbones.mmdit import MMDiT
from smalti.data.emoji import STYLES, load_emoji
from smalti.data.latent_cache import build_cache, cache_key
from smalti.data.packages import cache_folder
from smalti.evaluation.sheet import sheet
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji import latent_source
from smalti.sampling.pictures import draw_pictures
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.tokenizers.vision_backends import load_teacher
from smalti.training.config import TrainConfig
from smalti.training.progress import read_log
from smalti.training.repa import REPA, REPASettings, TeacherPort
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
cache = cache_folder() / "examples"
autoencoder = load_model("emoji").autoencoder
pictures = load_emoji("train", styles=["noto"], topics=["hearts", "clocks"])
source = latent_source(autoencoder, pictures, EmbeddingCache(MiniLMEncoder(length=16), cache), STYLES, cache)

teacher = load_teacher("vit-caption", tokens=(8, 8))  # or the folder of DINOv2, CLIP, MAE, ...
key = cache_key("example", pictures.hash, len(pictures))
features = build_cache(cache, key, len(pictures), lambda rows: teacher(pictures.pixels(rows)))
source = replace(source, features={"teacher": [features]})

torch.manual_seed(0)
model = MMDiT(in_channels=16, num_single=3, heads=4, num_labels=len(STYLES))
term = REPA(128, [TeacherPort("teacher", teacher.dim)], REPASettings(depth=2, weight=0.5, hidden=256))
config = TrainConfig(steps=steps, batch=32, learning_rate=2e-3, warmup=steps // 10, log_every=max(1, steps // 10))
trainer = Trainer(model, FlowMatching(), source, config, "repa-run", losses=[term])
report = trainer.fit()
for line in read_log(report.curve):
    print(f"step {line['step']}: objective {line['objective']:.3f}, cosine {line['alignment cosine']:.3f}")

pipe = TextToImagePipeline(trainer.ema_model, autoencoder, make_scheduler("euler"), text_length=16, styles=list(STYLES))
prompts = ["red heart", "blue heart", "three o'clock", "nine o'clock"]
sheet(draw_pictures(pipe, prompts, ["noto"] * 4, range(4)), prompts).save("repa.png")
