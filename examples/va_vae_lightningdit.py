"""Trains a small autoencoder whose latents a vision model recognises, then a LightningDiT on them.

python examples/va_vae_lightningdit.py [steps]
"""

import sys

import torch

from smalti.backbones.lightning_dit import LightningDiT
from smalti.data.emoji import load_emoji
from smalti.data.latent_cache import build_cache, cache_key
from smalti.data.packages import cache_folder
from smalti.evaluation.sheet import sheet, to_images
from smalti.objectives.cosine_velocity import CosineFlowMatching
from smalti.recipes.vae_arm import TaughtPictures
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.vision_backends import load_teacher
from smalti.training.config import TrainConfig
from smalti.training.latent_extraction import extract_latents, measure_channels
from smalti.training.latent_source import LatentSource
from smalti.training.tokenizer import TokenizerSettings, fit_tokenizer
from smalti.training.trainer import Trainer
from smalti.training.va_vae_lightningdit import VFLoss, VFSettings

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
pictures, cache = load_emoji("train", styles=["twemoji"], topics=["hearts", "weather"]), cache_folder() / "examples"
teacher = load_teacher("vit-caption", tokens=(8, 8))
table = build_cache(
    cache, cache_key("va-vae", pictures.hash), len(pictures), lambda rows: teacher(pictures.pixels(rows))
)

model = ConvAutoencoder(8, 32, widths=(16, 32, 64), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1))
model.start_from_patches(pictures.pixels())
config = TrainConfig(steps=steps, batch=8, learning_rate=1e-3, log_every=max(1, steps // 10))
term, settings = VFLoss(32, teacher.dim, VFSettings(weight=0.5)), TokenizerSettings(perceptual=0.0, critic=0.0)
taught = TaughtPictures(pictures, {"teacher": table})
fit_tokenizer(model, pictures, config, "va-vae", settings, terms=[term], source=taught)
measure_channels(model, [pictures.pixels()])

source = LatentSource(extract_latents(model, pictures, pictures.hash, cache))
trainer = Trainer(
    LightningDiT(in_channels=32, depth=4, heads=3, head_dim=32, base_size=8), CosineFlowMatching(), source,
    TrainConfig(steps=steps, batch=16, learning_rate=2e-3, betas=(0.9, 0.95)), "lightning",
)  # fmt: skip
print("loss", trainer.fit().loss)
pipe = TextToImagePipeline(trainer.ema_model.eval(), model, make_scheduler("euler"), text_encoder=None)
drawn = pipe("", num_images_per_prompt=8, num_inference_steps=10, generator=torch.Generator().manual_seed(0))
sheet([*drawn.images, *to_images(pictures.pixels(range(8)))], ["drawn"] * 8 + ["real"] * 8).save("va_vae.png")
