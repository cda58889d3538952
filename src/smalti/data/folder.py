"""A user's own folder of pictures as a training set.

Pictures (png, jpg, webp) are found in all sub-folders. What they are conditioned on:
captions, if there are any: `photo.txt` beside `photo.png`, or a line `{"file_name": ..., "text": ...}` in a
`metadata.jsonl` (which wins for the pictures that it names; its paths are relative to it);
else labels: the names of the sub-folders right under the folder, if at least two hold pictures;
else nothing.

Every file is decoded once when the folder is read; what cannot be used is left out and listed in `skipped`, never
silently. Pixels are decoded when asked for. Letters: B a batch, H W the sides of a bucket.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from smalti.core.errors import UserError
from smalti.core.files import file_hash
from smalti.data.buckets import Shape, aspect_buckets, fit, nearest_bucket
from smalti.data.folder_captions import Skipped, read_captions
from smalti.data.pictures import SUFFIXES, UnreadablePicture, read_picture

IGNORED_FOLDERS = ("__MACOSX",)


@dataclass(frozen=True, eq=False)
class FolderSet:
    """The usable pictures of a folder, sorted by path.

    Args:
        root: the folder.
        files: paths relative to it.
        shapes: the bucket (H, W) of each picture.
        captions: one a picture, or None.
        labels: index into `label_names` for each picture, or None.
        label_names: names of the sub-folders; empty without labels.
        skipped: what was left out, and why.
        hash: SHA-256 over the pictures' names, contents and shapes (captions and labels do not change it).
    """

    root: Path
    files: tuple[str, ...]
    shapes: tuple[Shape, ...]
    captions: list[str] | None
    labels: list[int] | None
    label_names: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    hash: str

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Sequence[int]) -> "FolderSet":
        """These pictures alone, as a folder that holds no others; `hash` is extended by their choice."""
        captions, labels = self.captions, self.labels
        return replace(
            self,
            files=tuple(self.files[i] for i in indices),
            shapes=tuple(self.shapes[i] for i in indices),
            captions=None if captions is None else [captions[i] for i in indices],
            labels=None if labels is None else [labels[i] for i in indices],
            hash=hashlib.sha256(f"{self.hash}:{list(indices)}".encode()).hexdigest(),
        )

    def pixels(self, indices: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        """Pictures of one bucket, scaled and cropped: (B, 3, H, W) float32 in [-1, 1].

        Raises:
            ValueError: the pictures are of several buckets; draw batches with `buckets.batches(folder.shapes, ...)`.
            UserError: a file has changed since the folder was read and cannot be decoded any more.
        """
        chosen = [int(i) for i in indices]
        shapes = {self.shapes[i] for i in chosen}
        if len(shapes) != 1:
            raise ValueError(f"got pictures of {len(shapes)} shapes {sorted(shapes)}; a batch must have one")
        arrays = np.stack([self._read(i) for i in chosen])  # (B, H, W, 3)
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _read(self, index: int) -> np.ndarray:
        try:
            return np.asarray(fit(read_picture(self.root / self.files[index]), self.shapes[index]))
        except UnreadablePicture as error:
            name = self.files[index]
            raise UserError(
                f"{name} in {self.root} has changed and cannot be read: {error}; restore or remove it"
            ) from error


def load_folder(path: Path | str, size: int = 64, multiple: int = 16, progress: bool = False) -> FolderSet:
    """Reads and checks a folder.

    Args:
        path: the folder.
        size: side in pixels of the square bucket, 64 to 512.
        multiple: what the sides of all buckets are a multiple of.
        progress: show a progress bar.

    Raises:
        UserError: no such folder, no usable picture, or a size that does not fit.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root} is {'no folder' if root.exists() else 'missing'}; give a folder that holds pictures")
    buckets = aspect_buckets(size, multiple)
    skipped: list[Skipped] = []
    files = sorted(_walk(root, skipped))
    names = [name for name in files if name.lower().endswith(SUFFIXES)]
    if not names:
        raise UserError(f"no pictures in {root}; put {', '.join(s[1:] for s in SUFFIXES)} files there")
    captions = read_captions(root, names, files, skipped)
    wanted, label_of = _conditions(names, captions, skipped)
    digest = hashlib.sha256(f"{size}:{multiple}".encode())
    shapes: dict[str, Shape] = {}
    for name in tqdm(wanted, desc="checking pictures", disable=not progress):
        try:
            picture = read_picture(root / name)
        except UnreadablePicture as error:
            skipped.append(Skipped(name, str(error)))
            continue
        shapes[name] = nearest_bucket(picture.height, picture.width, buckets)
        digest.update(f"\0{name}\0{file_hash(root / name)}\0{shapes[name]}".encode("utf-8", "surrogateescape"))
    if not shapes:
        first = skipped[0]
        raise UserError(
            f"none of the {len(names)} pictures in {root} can be used; the first: {first.file}: {first.reason}"
        )
    label_names = tuple(sorted({label_of[name] for name in shapes})) if label_of else ()
    return FolderSet(
        root=root,
        files=tuple(shapes),
        shapes=tuple(shapes.values()),
        captions=[captions[name] for name in shapes] if captions else None,
        labels=[label_names.index(label_of[name]) for name in shapes] if label_of else None,
        label_names=label_names,
        skipped=tuple(sorted(skipped, key=lambda one: one.file)),
        hash=digest.hexdigest(),
    )


def _walk(root: Path, skipped: list[Skipped]) -> Iterator[str]:
    """Paths of all files relative to `root`, with `/`; follows links to folders, each real folder once."""

    def report(error: OSError) -> None:
        name = Path(error.filename).relative_to(root).as_posix()
        skipped.append(Skipped(name, f"the folder cannot be read: {error.strerror}"))

    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, onerror=report, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in IGNORED_FOLDERS)
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name).relative_to(root).as_posix()


def _conditions(names: list[str], captions: dict[str, str], skipped: list[Skipped]) -> tuple[list[str], dict[str, str]]:
    """The pictures that can be conditioned like the others, and their labels (empty if there are none)."""
    if captions:
        known = {one.file for one in skipped}
        missing = [name for name in names if name not in captions and name not in known]
        skipped.extend(Skipped(name, "it has no caption, others have") for name in missing)
        return [name for name in names if name in captions], {}
    label_of = {name: name.split("/")[0] for name in names if "/" in name}
    if len(set(label_of.values())) < 2:
        return names, {}
    skipped.extend(
        Skipped(name, "it lies beside the sub-folders that name the labels") for name in names if name not in label_of
    )
    return list(label_of), label_of
