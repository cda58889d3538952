"""The teacher `vit-self`: a small vision transformer that learned emoji pictures from themselves, without captions.

A masked autoencoder sees a quarter of the patches and paints the rest; its encoder is the result. Training concepts
alone, all styles, all topics. It plays the part that MAE and DINO have for large models.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from smalti.core.files import check_writable
from smalti.data.emoji import load_emoji
from smalti.evaluation.emoji_metrics import concept_numbers
from smalti.objectives.masked_autoencoding import MaskedAutoencoder, MaskedAutoencoding
from smalti.recipes.vit_teacher import write_teacher
from smalti.tokenizers.vision_encoder import VisionTransformer
from smalti.training.config import TrainConfig
from smalti.training.messages import is_main
from smalti.training.processes import join_processes
from smalti.training.trainer import Trainer
from smalti.training.view_source import ViewSource


@dataclass(frozen=True)
class VitSelfRecipe:
    """Everything that decides the teacher.

    Args:
        training: steps, batch and rates.
        encoder: arguments of `VisionTransformer` that differ from its defaults.
        decoder: arguments of `MaskedAutoencoder` that differ from its defaults.
        hidden: share of the patches that is hidden.
        floor: added to the variance of a patch where its pixels are normalised.
    """

    training: TrainConfig
    encoder: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    hidden: float = 0.75
    floor: float = 1e-2


PRESETS = {
    "cpu": VitSelfRecipe(
        training=TrainConfig(
            steps=2000, batch=128, learning_rate=1.5e-3, warmup=100, decay="linear-cooldown", optimizer="muon",
            weight_decay=0.05, ema=0.998, save_every=100, eval_every=250, eval_samples=698,
        ),
    ),
    "gpu": VitSelfRecipe(
        training=TrainConfig(
            steps=20000, batch=512, learning_rate=1.5e-3, warmup=500, decay="linear-cooldown", optimizer="muon",
            weight_decay=0.05, ema=0.999, precision="bf16", save_every=1000, eval_every=500, eval_samples=698,
        ),
    ),
}  # fmt: skip


def train(recipe: VitSelfRecipe, out: Path, resume: bool = False) -> Path:
    """Trains the encoder and writes it; arguments and folders as in `recipes.vit_caption.train`."""
    check_writable(out)
    pictures, held_out = load_emoji("train"), load_emoji("held-out")
    source = ViewSource(pictures, concept_numbers(pictures))
    unseen = ViewSource(held_out, concept_numbers(held_out), shift=0.0, zoom=(1.0, 1.0))
    torch.manual_seed(recipe.training.seed)
    encoder = VisionTransformer(**recipe.encoder)
    patch_values = encoder.x_embedder.in_features
    model = MaskedAutoencoder(encoder, encoder.width, encoder.base_size, patch_values, **recipe.decoder)
    objective = MaskedAutoencoding(encoder.patch_size, recipe.hidden, recipe.floor)
    trainer = Trainer(
        model, objective, source, recipe.training, out / "training", held_out=unseen,
        description={
            "recipe": "vit-self", "data_hash": pictures.hash, "encoder": recipe.encoder, "decoder": recipe.decoder,
        },
    )  # fmt: skip
    report = trainer.fit(resume=resume)
    if is_main():
        trained: Any = trainer.ema_model.eval()
        write_teacher(trained.encoder, recipe, "vit-self", pictures.hash, report, out)
    join_processes().wait_for_everyone()
    return out / "model"
