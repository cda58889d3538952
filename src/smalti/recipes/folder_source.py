"""Training samples of the folder recipe: which pictures are held out, their latents, captions and labels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smalti.data.folder import FolderSet
from smalti.data.latent_cache import LatentCache, build_cache, cache_key
from smalti.evaluation.emoji_metrics import spread
from smalti.recipes.folder_autoencoder import Autoencoder
from smalti.recipes.folder_teacher import FEATURES, Teacher
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.autoencoder import shift_picture
from smalti.training.latent_source import LatentSource, embed_captions
from smalti.training.messages import is_main
from smalti.zoo.loader import weights_hash

HELD_OUT_FROM = 200
HELD_OUT_SHARE = 0.05
BATCH = 16


@dataclass(frozen=True)
class Split:
    """Which pictures are trained on and which are not.

    Args:
        train: indices of the training pictures.
        train_groups, held_out_groups: indices (n,) of the pictures of each shape; none is empty.
    """

    train: list[int]
    train_groups: list[Tensor]
    held_out_groups: list[Tensor]


class Sources(NamedTuple):
    """Samples for training, and those that are held out, if any."""

    train: LatentSource
    held_out: LatentSource | None


def split_pictures(pictures: FolderSet) -> Split:
    """Holds out one in twenty, evenly over the sorted files, from 200 pictures on."""
    every = range(len(pictures))
    count = round(HELD_OUT_SHARE * len(pictures)) if len(pictures) >= HELD_OUT_FROM else 0
    held_out = set(spread(len(pictures), count)) if count else set()
    train = [index for index in every if index not in held_out]
    return Split(train, _groups(pictures, train), _groups(pictures, sorted(held_out)))


def _groups(pictures: FolderSet, indices: list[int]) -> list[Tensor]:
    members: dict[tuple[int, int], list[int]] = {}
    for index in indices:
        members.setdefault(pictures.shapes[index], []).append(index)
    return [torch.tensor(members[shape]) for shape in sorted(members)]


def latent_sources(
    autoencoder: Autoencoder,
    pictures: FolderSet,
    split: Split,
    text_length: int,
    cache: Path,
    shift: int = 0,
    cluster: str = "",
    workers: int = 2,
    teacher: Teacher | None = None,
) -> Sources:
    """Latents of all pictures with their captions or labels, kept in the folder `cache`.

    Args:
        autoencoder: encodes.
        pictures: of the folder.
        split: what is trained on and what is held out.
        text_length: tokens of a caption.
        cache: the folder.
        shift: a picture to train on is also seen moved by so many pixels in four directions; 0 = only as it is.
        cluster, workers: where pictures are encoded, see `core.cluster.run_all`.
        teacher: whose features of every view come with the latents.
    """
    shifts = ((0, 0), (shift, 0), (-shift, 0), (0, shift), (0, -shift)) if shift else ((0, 0),)

    def tables(encode: Callable[[Tensor], Tensor], *what: Any) -> list[LatentCache]:
        """What is made of the pictures, one table a shift."""

        def table(down: int, right: int) -> LatentCache:
            def make(indices: Tensor) -> Tensor:
                return encode(
                    torch.stack([shift_picture(picture, down, right) for picture in pictures.pixels(indices)])
                )

            key = cache_key(pictures.hash, *what, *((down, right) if down or right else ()))
            return build_cache(
                cache, key, len(pictures), make, groups=pictures.shapes, batch=BATCH, progress=is_main(),
                cluster=cluster, workers=workers,
            )  # fmt: skip

        return [table(*one) for one in shifts]

    def encode(pixels: Tensor) -> Tensor:
        return autoencoder.encode(pixels.to(autoencoder.device)).tensor

    views = tables(encode, weights_hash(autoencoder))
    features = {} if teacher is None else {FEATURES: tables(teacher, *teacher.key)}
    captions = None
    if pictures.captions is not None:
        encoder = EmbeddingCache(MiniLMEncoder(length=text_length), cache / "text")
        captions = embed_captions([[caption] for caption in pictures.captions], encoder)
    labels = None if pictures.labels is None else torch.tensor(pictures.labels)
    common = (captions, labels, len(pictures.label_names))
    held_out = LatentSource(views[:1], *common, split.held_out_groups) if split.held_out_groups else None
    return Sources(LatentSource(views, *common, split.train_groups, features=features), held_out)
