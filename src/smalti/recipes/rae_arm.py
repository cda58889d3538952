"""Arms of RAE's claim: one picture learned by heart, decoders on noisy latents, and denoisers of its latents.

All on the shipped `rae-emoji`: 64 tokens of 192 channels. Beside it stands the autoencoder of `emoji`, with as many
tokens of 16 channels.
"""

import tempfile
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smalti.core.protocols import Latents
from smalti.core.seeds import generators_for, randn
from smalti.data.emoji import load_emoji
from smalti.evaluation.emoji_metrics import spread
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.reconstruction import psnr
from smalti.objectives.time_sampling import dimension_shift
from smalti.recipes.emoji_arm import Stock, stock, stock_of
from smalti.recipes.rae_emoji import CHUNK, group_probe, mean_latents
from smalti.tokenizers.rae import RAE
from smalti.training.autoencoder import chunks
from smalti.training.config import TrainConfig
from smalti.training.latent_source import LatentSource
from smalti.training.tokenizer import TokenizerSettings, fit_tokenizer
from smalti.training.trainer import Trainer
from smalti.zoo.loader import ZOO, load_part

CHANNELS, GRID, STARTING = 192, 8, 1024
SHIFT = dimension_shift((CHANNELS, GRID, GRID))


def load_rae() -> RAE:
    """The representation autoencoder that ships."""
    return load_part(ZOO / "rae-emoji", RAE)


@cache
def rae_stock() -> Stock:
    """Its latents of all pictures; call it once before arms are trained side by side."""
    return stock_of(load_rae())


def overfit_loss(model: nn.Module, seed: int, steps: int, batch: int = 8) -> float:
    """Flow-matching loss of a denoiser that has seen nothing but one held-out picture, on that picture.

    Args:
        model: without conditions; changed in place.
        seed: of the training, and which picture.
        steps: of training.
        batch: draws of noise and time a step.
    """
    held_out = load_emoji("held-out")
    latents = load_rae().encode(held_out.pixels([(97 * seed) % len(held_out)])).tensor
    views: Any = [latents.expand(64, -1, -1, -1).contiguous()]
    source = LatentSource(views)
    config = TrainConfig(
        steps=steps, batch=batch, learning_rate=2e-3, warmup=steps // 10, decay="linear-cooldown", ema=0.9,
        weight_decay=0.0, seed=seed, eval_every=steps, eval_samples=64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        report = Trainer(model, FlowMatching(shift=SHIFT), source, config, Path(folder), held_out=source).fit()
    assert report.held_out_loss is not None
    return report.held_out_loss


class Painted(NamedTuple):
    """PSNR in dB of held-out pictures painted from clean latents, and from latents with noise."""

    clean: float
    noisy: float


def painted(tau: float, seed: int, steps: int, level: float = 0.3, depth: int = 3) -> Painted:
    """Trains a decoder on pixels alone and measures it.

    Args:
        tau: largest deviation of the noise on its features; 0 = none.
        seed: of the training.
        steps: of training, 16 pictures each.
        level: deviation of the noise at which it is measured, of features that have a variance of 1.
        depth: its blocks.
    """
    torch.manual_seed(seed)
    model, pictures = RAE(depth=depth), load_emoji("train")
    model.start_linear(pictures.pixels(spread(len(pictures), STARTING)))
    config = TrainConfig(
        steps=steps, batch=16, learning_rate=2e-3, warmup=steps // 10, decay="cosine", betas=(0.9, 0.95),
        weight_decay=0.0, ema=0.98, seed=seed,
    )  # fmt: skip
    settings = TokenizerSettings(perceptual=0.0, kl=0.0, critic=0.0, learned_deviation=False, tau=tau)
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        fit_tokenizer(model, pictures, config, Path(folder), settings)
    return Painted(*(noisy_psnr(model, one) for one in (0.0, level)))


@torch.no_grad()
def noisy_psnr(model: RAE, level: float, count: int = 256) -> float:
    """Mean PSNR in dB of held-out pictures painted from features with noise of this deviation; seeds are their rows."""
    held_out = load_emoji("held-out")
    found: list[Tensor] = []
    for rows in chunks(spread(len(held_out), count), CHUNK):
        pixels = held_out.pixels(rows)
        z = model.encoder(pixels)
        z = z + level * randn(z.shape, generators_for(list(rows)))
        found.append(psnr(model.decode(Latents(model.normalise(z))), pixels))
    return fmean(torch.cat(found).tolist())


def latent_probes() -> dict[str, float]:
    """Share of held-out pictures whose group a linear probe reads off their mean latent, of rae and vae."""
    pictures, held_out = load_emoji("train"), load_emoji("held-out")
    tokenizers = {"rae": load_rae(), "vae": stock().autoencoder}
    return {
        name: group_probe(mean_latents(one, pictures), mean_latents(one, held_out), pictures, held_out)
        for name, one in tokenizers.items()
    }
