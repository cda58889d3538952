"""Trains a small MicroDiT on emoji: most steps on a quarter of the tokens, the last ones on all; then draws.

python examples/microdit.py [steps]
"""

import sys

import torch

from smalti.backbones.microdit import SHAPES, MicroDiT
from smalti.data.emoji import STYLES, load_emoji
from smalti.data.packages import cache_folder
from smalti.evaluation.sheet import sheet
from smalti.objectives.masked_loss import MaskedFlowMatching
from smalti.ops.token_masks import RandomMask
from smalti.recipes.emoji import latent_source
from smalti.sampling.pictures import draw_pictures
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.tokenizers.zero_null import ZeroNull
from smalti.training.config import TrainConfig
from smalti.training.stages import Stage, train_stages
from smalti.zoo.loader import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
cache = cache_folder() / "examples"
autoencoder, encoder = load_model("emoji").autoencoder, ZeroNull(EmbeddingCache(MiniLMEncoder(length=16), cache))
source = latent_source(autoencoder, load_emoji("train", styles=["noto"]), encoder, STYLES, cache)

torch.manual_seed(0)
model = MicroDiT(in_channels=16, patch_size=1, text_dim=384, num_labels=4, base_size=8, **SHAPES["small"])
stages = [
    Stage("masked", MaskedFlowMatching(RandomMask(0.75)), TrainConfig(steps, 32, 2e-3), source),
    Stage("unmasked", MaskedFlowMatching(RandomMask(0.0)), TrainConfig(max(1, steps // 8), 32, 1e-3, decay="cosine")),
]
report = train_stages(model, stages, "microdit-run")
print(report.table())

pipe = TextToImagePipeline(report.averaged, autoencoder, make_scheduler("euler"), text_length=16, styles=list(STYLES))
pipe.use_text_encoder(encoder)
prompts = ["red heart", "grinning face", "three o'clock", "green apple"]
sheet(draw_pictures(pipe, prompts, ["noto"] * 4, range(4)), prompts).save("microdit.png")
