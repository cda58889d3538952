"""Animated emoji as a text-to-clip data set: 734 loops of 16 frames at 64 px with alpha, captions and split of `emoji`.

`smalti data get clips` downloads four packages (730 MB) and keeps what is needed in one zip of the cache: `clips.json`,
the index of a prepared emoji set, and a sheet `KEY.webp` for each clip, its frames one below the other, lossless. The
frames stand evenly over the loop (3 s in most), so that the first follows the last.
"""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from smalti.core.errors import UserError
from smalti.core.files import atomic_folder, file_hash
from smalti.data.catalog import DatasetInfo
from smalti.data.emoji import EmojiSet, choose, items_of
from smalti.data.emoji_prepare import add_file, copy_licences, describe, is_held_out
from smalti.data.emoji_sources import CAPTIONS, Source, emoji_key, read_emoji
from smalti.data.packages import cache_folder

STYLE = "fluent-3d"
FRAMES, SIZE = 16, 64
PARTS = tuple(
    Source(f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", "MIT", "Microsoft", "https://github.com/microsoft/fluentui-emoji")
    for part in (1, 2, 3, 4)
)  # fmt: skip


def load_clips(split: str = "train", topics: list[str] | tuple[str, ...] | None = None) -> EmojiSet:
    """Reads the prepared clips.

    Args:
        split: "train", "held-out" or "all"; by concept, as that of the pictures.
        topics: names in `emoji.TOPICS`; None takes everything.

    Returns:
        Items in emojibase's order; images (N, 16, 64, 64, 4).

    Raises:
        UserError: a name is unknown, or the set has not been prepared yet.
    """
    path = clips_path()
    if not path.is_file():
        raise UserError("the clips are not prepared; run: smalti data get clips")
    with zipfile.ZipFile(path) as archive:
        items = items_of(json.loads(archive.read("clips.json")))
        chosen = choose(items, split, topics)
        clips = [_frames(archive.read(f"{items[i].key}.webp")) for i in chosen]
    return EmojiSet(tuple(items[i] for i in chosen), np.stack(clips), file_hash(path))


def clips_path() -> Path:
    """Where the prepared clips lie once they are made."""
    return cache_folder() / "prepared" / "clips" / "clips.zip"


def prepare(progress: bool = False) -> Path:
    """Makes the prepared clips in the cache, with the licences of their sources beside them; reused when present.

    Raises:
        UserError: a package cannot be had.
    """
    path = clips_path()
    if path.is_file():
        return path
    found = {emoji_key(file.stem): file for part in PARTS for file in sorted((part.folder() / "assets").glob("*.webp"))}
    emoji = [one for one in read_emoji() if one.key in found]
    sheets = {}
    for one in tqdm(emoji, desc="reading clips", disable=not progress):
        sheet = read_clip(found[one.key])
        if sheet is not None:
            sheets[one.key] = sheet
    emoji = [one for one in emoji if one.key in sheets]
    index = {
        "format": 1,
        "size": SIZE,
        "frames": FRAMES,
        "sources": [describe(source) for source in (CAPTIONS, *PARTS)],
        "held_out": sorted({one.concept for one in emoji if is_held_out(one.concept)}),
        "emoji": [[one.key, one.concept, one.label, list(one.tags), one.group, one.subgroup] for one in emoji],
        "styles": {STYLE: list(sheets)},
    }
    with atomic_folder(path.parent) as folder:
        with zipfile.ZipFile(folder / path.name, "w", zipfile.ZIP_STORED) as archive:
            add_file(archive, "clips.json", json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode())
            for key, sheet in sheets.items():
                add_file(archive, f"{key}.webp", sheet)
        copy_licences((CAPTIONS, *PARTS), folder / "licenses")
    return path


def read_clip(path: Path) -> bytes | None:
    """The sheet of an animation: frames evenly over its loop, reduced to 64 px; None if it has fewer than 16."""
    with Image.open(path) as file:
        count = getattr(file, "n_frames", 1)
        if count < FRAMES:
            return None
        frames = []
        for frame in range(FRAMES):
            file.seek(frame * count // FRAMES)
            frames.append(np.asarray(file.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(frames)).save(buffer, "WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def _frames(sheet: bytes) -> np.ndarray:
    """(F, S, S, 4) uint8."""
    with Image.open(io.BytesIO(sheet)) as file:
        return np.asarray(file.convert("RGBA")).reshape(FRAMES, SIZE, SIZE, 4)


DATASETS = {
    "clips": DatasetInfo(
        name="clips",
        summary="734 animated emoji, 16 frames of 64 px, captions",
        licence="MIT",
        where="npm: " + ", ".join(f"{source.package} {source.version}" for source in (CAPTIONS, *PARTS)),
        megabytes=750,
        location=clips_path,
        prepare=prepare,
    )
}
