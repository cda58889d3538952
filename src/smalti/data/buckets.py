"""Aspect buckets: pictures of any shape in batches of one shape, at about equal cost.

A bucket is a shape (H, W) whose sides are multiples of what the model needs and whose area is near `size`^2. Each
picture goes to the bucket nearest in log aspect ratio, is scaled to cover it, and loses what stands over at two sides.

Source: the bucketing of NovelAI (blog, 2022), restated in SDXL (arXiv 2307.01952, section 2.3).
"""

import math
from collections.abc import Hashable, Sequence

import torch
from PIL import Image

from smalti.core.errors import UserError
from smalti.core.seeds import derive_seed

SMALLEST, LARGEST = 64, 512

Shape = tuple[int, int]


def aspect_buckets(size: int, multiple: int, limit: float = 2.0) -> tuple[Shape, ...]:
    """The shapes (H, W) for pictures of about `size` x `size` pixels, from the widest to the tallest.

    Args:
        size: side of the square bucket, 64 to 512.
        multiple: what both sides are a multiple of, usually downsampling of the tokenizer times patch.
        limit: the largest ratio of the sides.

    Raises:
        UserError: the size is out of range or no multiple of `multiple`.

    Example:
        >>> aspect_buckets(64, 16)
        ((48, 80), (48, 96), (64, 64), (80, 48), (96, 48))
    """
    if not SMALLEST <= size <= LARGEST:
        raise UserError(f"size {size} is out of range; choose one from {SMALLEST} to {LARGEST}")
    if multiple < 1 or size % multiple:
        nearest = max(multiple, round(size / max(multiple, 1)) * multiple)
        raise UserError(f"size {size} is no multiple of {multiple}; the nearest that is: {nearest}")
    sides = range(multiple, int(size * math.sqrt(limit)) + multiple, multiple)
    found = {(size, size)}
    for side in sides:
        other = max(multiple, round(size * size / side / multiple) * multiple)
        for shape in ((side, other), (other, side)):
            if max(shape) / min(shape) <= limit and abs(shape[0] * shape[1] / size**2 - 1) <= 0.125:
                found.add(shape)
    return tuple(sorted(found))


def nearest_bucket(height: int, width: int, buckets: Sequence[Shape]) -> Shape:
    """The bucket whose aspect ratio is nearest in the logarithm; the squarer one if two are equally near."""
    aspect = math.log(height / width)
    return min(buckets, key=lambda shape: (abs(math.log(shape[0] / shape[1]) - aspect), abs(shape[0] - shape[1])))


def fit(picture: Image.Image, shape: Shape) -> Image.Image:
    """Scales to cover `shape` (H, W) and cuts off what stands over, alike at both sides."""
    height, width = shape
    scale = min(picture.height / height, picture.width / width)
    left, top = (picture.width - width * scale) / 2, (picture.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)


def batches(
    groups: Sequence[Hashable], batch: int, seed: int, epoch: int = 0, drop_last: bool = False
) -> list[list[int]]:
    """Sample indices of one epoch in shuffled batches, each within one group; the same for the same seed and epoch.

    Args:
        groups: the group of each sample, such as its bucket.
        batch: largest number of samples in a batch.
        seed: of the whole training.
        epoch: number of the pass; each has its own order.
        drop_last: leave out what fills no batch; without it every sample appears exactly once.
    """
    if batch < 1:
        raise UserError(f"batch {batch} is too small; choose 1 or more")
    generator = torch.Generator().manual_seed(derive_seed("batches", seed, epoch))
    members: dict[Hashable, list[int]] = {}
    for i in torch.randperm(len(groups), generator=generator).tolist():
        members.setdefault(groups[i], []).append(i)
    found = [
        indices[start : start + batch]
        for indices in members.values()
        for start in range(0, len(indices) - batch + 1 if drop_last else len(indices), batch)
    ]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
