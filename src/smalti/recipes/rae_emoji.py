"""The representation autoencoder `rae-emoji`: a decoder that paints emoji from what `vit-self` sees in them.

The encoder ships already and stays as it is. The decoder learns on all training pictures, from features with noise.
`cpu`: it begins as the best linear one and learns from pixels alone; a short finish with VGG features and a critic, 90
steps of 8 pictures, made it worse (22.1 dB became 17.7). `gpu`: from everything at once, but for the critic's late
start; the critic looks through `vit-caption`.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from smalti.core.files import atomic_folder, check_writable, write_json
from smalti.data.emoji import EmojiSet, load_emoji
from smalti.evaluation.emoji_metrics import concept_numbers, spread
from smalti.evaluation.probe import linear_probe
from smalti.evaluation.reconstruction import reconstruction_report
from smalti.recipes.vit_teacher import small_pixels
from smalti.tokenizers.rae import RAE
from smalti.tokenizers.vision_backends import load_teacher
from smalti.training.autoencoder import chunks
from smalti.training.config import TrainConfig
from smalti.training.feature_critic import FeatureCritic
from smalti.training.messages import is_main
from smalti.training.processes import join_processes
from smalti.training.tokenizer import TokenizerSettings, fit_tokenizer
from smalti.zoo.loader import CARD, cast_weights, provenance, settings_hash

CHUNK = 64


@dataclass(frozen=True)
class RAERecipe:
    """Everything that decides the decoder.

    Args:
        training: steps, batch and rates.
        before: of a training on pixels alone that goes before; None = there is none.
        losses: their weights and starts, and the noise.
        model: arguments of `RAE` that differ from its defaults.
        critic: the teacher that the critic looks through; None = a critic of pixels.
        linear_start: pictures from which the best linear decoder is found, to begin with; 0 = a random one.
        measured: held-out pictures that are painted and measured at the end.
    """

    training: TrainConfig
    before: TrainConfig | None = None
    losses: TokenizerSettings = field(default_factory=TokenizerSettings)
    model: dict[str, Any] = field(default_factory=dict)
    critic: str | None = "vit-caption"
    linear_start: int = 0
    measured: int = 698


PRESETS = {
    "cpu": RAERecipe(
        training=TrainConfig(
            steps=240, batch=16, learning_rate=1e-3, warmup=50, decay="cosine", betas=(0.9, 0.95), weight_decay=0.0,
            ema=0.99, save_every=50,
        ),
        losses=TokenizerSettings(
            perceptual=0.0, kl=0.0, critic=0.0, critic_learns_from=30, critic_from=45, learned_deviation=False,
            is_augmented=True, tau=0.8,
        ),
        linear_start=1024,
        measured=400,
    ),
    "gpu": RAERecipe(
        training=TrainConfig(
            steps=20000, batch=512, learning_rate=2e-4, warmup=500, decay="cosine", betas=(0.9, 0.95),
            weight_decay=0.0, ema=0.9978, precision="bf16", save_every=1000,
        ),
        losses=TokenizerSettings(
            perceptual=1.0, kl=0.0, critic=0.75, critic_learns_from=7500, critic_from=10000, learned_deviation=False,
            is_augmented=True, tau=0.8,
        ),
    ),
}  # fmt: skip


def train(recipe: RAERecipe, out: Path, resume: bool = False) -> Path:
    """Trains the decoder, measures statistics and quality, and writes `out / "model"`, whose path it returns."""
    check_writable(out)
    pictures = load_emoji("train")
    model = start(recipe, pictures)
    if recipe.before is not None:
        pixels_alone = replace(recipe.losses, perceptual=0.0, critic=0.0)
        fit_tokenizer(model, pictures, recipe.before, out / "pixels", pixels_alone, resume=resume)
    critic = None if recipe.critic is None else FeatureCritic(load_teacher(recipe.critic))
    report = fit_tokenizer(
        model, pictures, recipe.training, out / "training", recipe.losses, critic=critic, resume=resume
    )
    if is_main():
        model.measure_statistics(pictures.pixels(some) for some in chunks(range(len(pictures)), CHUNK))
        settings = asdict(recipe)
        card = {
            "recipe": "rae-emoji",
            "data_hash": pictures.hash,
            "settings": settings,
            "settings_hash": settings_hash(settings),
            "images_seen": report.steps * recipe.training.batch,
            "metrics": rae_metrics(model, pictures, load_emoji("held-out"), recipe.measured),
        }
        with atomic_folder(out / "model") as folder:
            model.save_pretrained(folder)
            cast_weights(folder, torch.bfloat16, keep={name for name, _ in model.named_buffers()})
            write_json(folder / CARD, card | provenance())
    join_processes().wait_for_everyone()
    return out / "model"


def start(recipe: RAERecipe, pictures: EmojiSet) -> RAE:
    """The untrained model."""
    torch.manual_seed(recipe.training.seed)
    model = RAE(**recipe.model)
    if recipe.linear_start:
        model.start_linear(pictures.pixels(spread(len(pictures), recipe.linear_start)))
    return model


def rae_metrics(model: RAE, pictures: EmojiSet, held_out: EmojiSet, count: int) -> dict[str, float]:
    """PSNR, SSIM and rFD of held-out pictures, and what a linear probe reads off latents and, beside it, pixels."""
    found = reconstruction_report(model, held_out, spread(len(held_out), count))
    latents, unseen = (mean_latents(model, some) for some in (pictures, held_out))
    found["group probe of latents"] = group_probe(latents, unseen, pictures, held_out)
    pixels, unseen = small_pixels(pictures), small_pixels(held_out)
    found["group probe of pixels"] = group_probe(pixels, unseen, pictures, held_out)
    return {name: round(value, 4) for name, value in found.items()}


@torch.no_grad()
def mean_latents(tokenizer: Any, pictures: EmojiSet) -> torch.Tensor:
    """The mean latent (N, C) of each picture."""
    parts = (tokenizer.encode(pictures.pixels(some)).tensor for some in chunks(range(len(pictures)), CHUNK))
    return torch.cat([latents.mean((2, 3)) for latents in parts])


def group_probe(features: torch.Tensor, unseen: torch.Tensor, pictures: EmojiSet, held_out: EmojiSet) -> float:
    """Share of held-out pictures whose emojibase group a linear probe of their features names."""
    names = sorted({item.group for item in pictures.items})
    classes = [torch.tensor([names.index(item.group) for item in some.items]) for some in (pictures, held_out)]
    return linear_probe(features, classes[0], concept_numbers(pictures), unseen, classes[1])
