"""The autoencoder `vae-emoji` alone: 64 px <-> 16 x 16 x 8 latents, as preset `gpu` of recipe `emoji` trains it."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from smalti.core.files import atomic_folder, check_writable, write_json
from smalti.data.emoji import load_emoji
from smalti.recipes.emoji import PRESETS as EMOJI
from smalti.recipes.emoji import EmojiRecipe, held_out_psnr, train_autoencoder
from smalti.training.messages import is_main
from smalti.training.processes import join_processes
from smalti.zoo.loader import CARD, cast_weights, provenance, settings_hash

PRESETS = {"cpu": EMOJI["gpu"], "gpu": EMOJI["gpu"]}


def train(recipe: EmojiRecipe, out: Path, resume: bool = False) -> Path:
    """Trains the autoencoder of a recipe and writes it to `out / "model"`, whose path it returns."""
    check_writable(out)
    model = train_autoencoder(replace(recipe, variant=None), out, resume)
    if is_main():
        settings = {"autoencoder": recipe.autoencoder, "training": asdict(recipe.autoencoder_training)}
        card = {
            "recipe": "vae-emoji",
            "settings": settings,
            "settings_hash": settings_hash(settings),
            "data_hash": load_emoji("train").hash,
            "metrics": {"held-out PSNR in dB": held_out_psnr(model, recipe)},
        }
        with atomic_folder(out / "model") as folder:
            model.save_pretrained(folder)
            cast_weights(folder, torch.bfloat16, keep={name for name, _ in model.named_buffers()})
            write_json(folder / CARD, card | provenance())
    join_processes().wait_for_everyone()
    return out / "model"
