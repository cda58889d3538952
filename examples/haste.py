"""Trains a small model on emoji with HASTE: features and attention follow an encoder at first, then the model alone.

python examples/haste.py [steps]
"""

import sys
from dataclasses import replace

import torch

from smalti.backbones.mmdit import MMDiT
from smalti.data.emoji import STYLES, load_emoji
from smalti.data.packages import cache_folder
from smalti.evaluation.sheet import sheet
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.aligned_arm import PictureTable
from smalti.recipes.emoji import latent_source
from smalti.sampling.pictures import draw_pictures
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.tokenizers.vision_backends import load_teacher
from smalti.training.config import TrainConfig
from smalti.training.haste import HASTESettings, HolisticAlignment
from smalti.training.progress import read_log
from smalti.training.stopping import StopAt
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
cache, autoencoder = cache_folder() / "examples", load_model("emoji").autoencoder
pictures = load_emoji("train", styles=["noto"], topics=["hearts", "clocks"])
source = latent_source(autoencoder, pictures, EmbeddingCache(MiniLMEncoder(length=16), cache), STYLES, cache)
source = replace(source, features={"pixels": [PictureTable(pictures)]})  # the teacher looks at them

torch.manual_seed(0)
model = MMDiT(in_channels=16, num_single=3, heads=4, num_labels=len(STYLES))
teacher = load_teacher("vit-self", tokens=(8, 8))  # or the folder of DINOv2, CLIP, MAE, ...
term = HolisticAlignment(128, teacher, HASTESettings(depth=2, pairs=((1, 4), (2, 5)), hidden=256))
rule = StopAt(("haste",), step=max(1, steps * 3 // 10))  # or StopOnConflict, StopOnPlateau
config = TrainConfig(steps=steps, batch=32, learning_rate=2e-3, warmup=steps // 10, log_every=max(1, steps // 10))
trainer = Trainer(model, FlowMatching(), source, config, "haste-run", losses=[term], stops=[rule])
for line in read_log(trainer.fit().curve):
    print(f"step {line['step']}: objective {line['objective']:.3f}, alignment {line.get('haste', 'off')}")

pipe = TextToImagePipeline(trainer.ema_model, autoencoder, make_scheduler("euler"), text_length=16, styles=list(STYLES))
prompts = ["red heart", "blue heart", "three o'clock", "nine o'clock"]
sheet(draw_pictures(pipe, prompts, ["noto"] * 4, range(4)), prompts).save("haste.png")
