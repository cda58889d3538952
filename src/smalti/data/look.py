"""What there is to know of a folder of pictures before a model is trained on it: sizes, conditions, copies.

Files of equal content are the same picture. Of some pictures small grey copies are compared, too: two that differ by
less than 2 of 255 grey values on average are near duplicates, such as a picture saved twice in different formats.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.core.files import file_hash
from smalti.data.buckets import Shape
from smalti.data.folder import FolderSet

THUMBNAIL = 16
NEAR = 2 / 255
CHUNK = 512


@dataclass(frozen=True)
class Look:
    """What was seen.

    Args:
        pictures: how many can be used.
        skipped: how many cannot.
        shapes: pictures by the bucket (H, W) that they go to.
        words: shortest, median and longest caption in words; None without captions.
        labels: pictures by label; empty without labels.
        copies: pictures whose file is the same as an earlier one's.
        near_copies: pictures, of `compared`, that look like another one of another content.
        compared: how many were compared by their looks.
    """

    pictures: int
    skipped: int
    shapes: dict[Shape, int]
    words: tuple[int, float, int] | None
    labels: dict[str, int]
    copies: int
    near_copies: int
    compared: int

    def __str__(self) -> str:
        parts = [f"{self.pictures} pictures" + (f", {self.skipped} skipped" if self.skipped else "")]
        most = max(self.shapes, key=lambda shape: self.shapes[shape])
        sides = f"{most[1]} x {most[0]}"
        parts.append(f"all {sides}" if len(self.shapes) == 1 else f"{len(self.shapes)} shapes, most of them {sides}")
        if self.words is not None:
            parts.append(f"captions of {self.words[0]} to {self.words[2]} words ({self.words[1]:g} in the middle)")
        if self.labels:
            least, largest = min(self.labels.values()), max(self.labels.values())
            parts.append(f"{len(self.labels)} labels of {least} to {largest} pictures")
        parts.append(f"files that repeat another one: {self.copies}" if self.copies else "no file is there twice")
        if self.near_copies:
            parts.append(f"pictures that look like another one: {self.near_copies} of {self.compared}")
        return "; ".join(parts)


def look(pictures: FolderSet, compared: Sequence[int]) -> Look:
    """Looks at a folder.

    Args:
        pictures: the folder.
        compared: indices of the pictures that are compared by their looks.
    """
    contents = [file_hash(pictures.root / name) for name in pictures.files]
    words = sorted(len(caption.split()) for caption in pictures.captions or ())
    names = [pictures.label_names[label] for label in pictures.labels or ()]
    first: dict[str, int] = {}
    for index in compared:
        first.setdefault(contents[index], index)
    return Look(
        pictures=len(pictures),
        skipped=len(pictures.skipped),
        shapes=dict(Counter(pictures.shapes)),
        words=(words[0], median(words), words[-1]) if words else None,
        labels=dict(Counter(names)),
        copies=len(contents) - len(set(contents)),
        near_copies=near_copies(torch.cat([thumbnail(pictures.pixels([index])) for index in first.values()])),
        compared=len(first),
    )


def thumbnail(pixels: Tensor) -> Tensor:
    """Grey values in [0, 1] of pictures (B, 3, H, W) in [-1, 1], averaged to (B, 256)."""
    grey = (pixels.mean(1, keepdim=True) + 1) / 2
    return F.adaptive_avg_pool2d(grey, THUMBNAIL).flatten(1)


def near_copies(thumbnails: Tensor) -> int:
    """How many of these (N, 256) differ by less than `NEAR` on average from an earlier one."""
    found = 0
    for start in range(0, len(thumbnails), CHUNK):
        rows = thumbnails[start : start + CHUNK]
        distance = torch.cdist(rows, thumbnails[: start + len(rows)], p=1) / thumbnails.shape[1]
        distance[torch.arange(len(rows))[:, None] + start <= torch.arange(start + len(rows))] = torch.inf
        found += int((distance < NEAR).any(1).sum())
    return found
