"""Latents of handwritten digits: 8 x 8 x 4 numbers for 32 x 32 pixels, by a small autoencoder that is made once.

It is trained within a minute on the training digits, in three equal channels, and kept in the cache with the means and
deviations of all posteriors, from which every epoch draws anew.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from smalti.core.files import atomic_folder
from smalti.core.protocols import Latents
from smalti.data.digit_maps import digit_maps
from smalti.data.digits import CLASSES, DigitSet, load_digits
from smalti.data.latent_cache import LatentCache, build_cache, cache_key
from smalti.data.packages import cache_folder
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.training.autoencoder import fit_autoencoder
from smalti.training.config import TrainConfig
from smalti.training.encoded_source import EncodedSource
from smalti.training.latent_source import LatentSource
from smalti.zoo.loader import settings_hash, weights_hash

CHANNELS, FACTOR, GRID = 4, 4, 8
SHAPE = {
    "latent_channels": CHANNELS,
    "factor": FACTOR,
    "widths": (16, 32),
    "encoder_blocks": (1, 1),
    "decoder_blocks": (1, 1),
}
TRAINING = TrainConfig(
    steps=600, batch=64, learning_rate=3e-3, warmup=30, decay="linear-cooldown", ema=0.99, weight_decay=0.0
)


@dataclass(frozen=True)
class GreyPictures:
    """Digits as pictures of three equal channels."""

    digits: DigitSet

    def __len__(self) -> int:
        return len(self.digits)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, 32, 32) in [-1, 1]."""
        rows = torch.as_tensor(indices)
        return DigitSet(self.digits.images[rows], self.digits.labels[rows], "").pixels().expand(-1, 3, -1, -1)


@cache
def digit_autoencoder() -> ConvAutoencoder:
    """The autoencoder, trained at the first call."""
    digits = load_digits("train")
    name = f"digit-autoencoder-{digits.hash[:12]}-{settings_hash({**SHAPE, **asdict(TRAINING)})[:12]}"
    folder = cache_folder() / "prepared" / name
    if not folder.is_dir():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(TRAINING.seed)
            model = ConvAutoencoder(**SHAPE)  # type: ignore[arg-type]
            with atomic_folder(folder) as made:
                fit_autoencoder(model, GreyPictures(digits), TRAINING, Path(made) / "training")
                model.save_pretrained(made)
    return ConvAutoencoder.from_pretrained(folder).eval().requires_grad_(False)


@cache
def digit_latents(split: str, has_maps: bool = False) -> LatentSource:
    """Latents with classes, drawn from their posteriors each time; those of "held-out" are the means.

    Args:
        split: train or held-out.
        has_maps: whether maps come too, as `segments`; the class is dropped then, because the map tells it.
    """
    digits = load_digits(split)  # type: ignore[arg-type]
    maps = {"segments": [digit_maps(digits)]} if has_maps else {}
    return LatentSource(
        views=[_table(digits, split, "mean")],
        deviations=[_table(digits, split, "deviation")] if split == "train" else None,
        labels=digits.labels, dropped_label=CLASSES, label_dropout=1.0 if has_maps else 0.1, features=maps,  # type: ignore[arg-type]
    )  # fmt: skip


def encoded_digits(split: str) -> EncodedSource:
    """The same samples, encoded when they are asked for."""
    digits = load_digits(split)  # type: ignore[arg-type]
    return EncodedSource(
        GreyPictures(digits), digit_autoencoder(), digits.labels, CLASSES, is_drawn=split == "train"
    )  # fmt: skip


@torch.no_grad()
def decode_digits(latents: Tensor) -> Tensor:
    """Grey pixels (N, 1, 32, 32) in [-1, 1] of latents (N, 4, 8, 8)."""
    model = digit_autoencoder()
    return torch.cat([model.decode(Latents(part)).mean(1, keepdim=True) for part in latents.split(250)])


def _table(digits: DigitSet, split: str, kind: str) -> LatentCache:
    model, pictures = digit_autoencoder(), GreyPictures(digits)

    def encode(rows: Tensor) -> Tensor:
        latents = model.encode(pictures.pixels(rows.tolist()))
        if kind == "mean":
            return latents.tensor
        return (0.5 * latents.statistics["logvar"]).exp() / model.latents_std[:, None, None]

    key = cache_key("digit-latents", digits.hash, split, weights_hash(model), kind)
    return build_cache(cache_folder() / "arms", key, len(digits), encode)
