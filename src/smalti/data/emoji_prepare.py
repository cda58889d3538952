"""Makes the prepared emoji sets from the packages, the same bytes every time.

A prepared set is one zip (stored, fixed times): `emoji.json` and, for each style, sheets `STYLE/000.webp` of 64
pictures one below the other, lossless with alpha, in emojibase's order (neighbours look alike, which keeps the sheets
small).

The split is by concept: held out is a concept whose SHA-256 with a fixed salt is divisible by ten. It depends on
nothing but the key, so variants, further styles and later editions agree on it; the list stands in `emoji.json`. The
salt is the one of 0..299 whose share is nearest to a tenth in every group and topic.
"""

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from smalti.core.errors import unknown_name
from smalti.core.files import atomic_file, atomic_folder
from smalti.data.catalog import DatasetInfo
from smalti.data.emoji_sources import CAPTIONS, Emoji, Source, find_drawings, rasterise, read_emoji, style_source
from smalti.data.packages import cache_folder

SHEET = 64  # pictures in a sheet
SALT = "149"
SHIPPED = Path(__file__).parent / "prepared" / "emoji.zip"
LICENCES = Path(__file__).parent / "prepared" / "licenses"
PERMISSIVE = ("noto", "twemoji", "fluent-3d", "fluent-flat")


@dataclass(frozen=True)
class EmojiBuild:
    """What a prepared set holds.

    Args:
        styles: drawing styles, in order.
        size: side of the pictures in pixels.
        tones: with skin-tone variants.
    """

    styles: tuple[str, ...] = PERMISSIVE
    size: int = 64
    tones: bool = False


BUILDS = {
    "emoji": EmojiBuild(),
    "emoji-tones": EmojiBuild(tones=True),
    "emoji-128": EmojiBuild(size=128),
    "openmoji": EmojiBuild(styles=("openmoji",)),
}


def is_held_out(concept: str) -> bool:
    """Whether a concept belongs to the tenth that no training sees."""
    digest = hashlib.sha256(f"{SALT}:{concept}".encode()).hexdigest()
    return int(digest[:8], 16) % 10 == 0


def prepared_path(name: str) -> Path:
    """Where the prepared set `name` lies: "emoji" in the package, the others in the cache once they are made."""
    if name not in BUILDS:
        raise unknown_name("emoji set", name, BUILDS)
    return SHIPPED if name == "emoji" else cache_folder() / "prepared" / name / "emoji.zip"


def prepare(name: str, progress: bool = False) -> Path:
    """Makes a prepared set in the cache, with the licences of its sources beside it; reused when present.

    Args:
        name: a key of `BUILDS`.
        progress: show a progress bar.

    Returns:
        The path of the zip.

    Raises:
        UserError: unknown name, or a package cannot be had.
    """
    if name not in BUILDS:
        raise unknown_name("emoji set", name, BUILDS)
    folder = cache_folder() / "prepared" / name
    if not (folder / "emoji.zip").is_file():
        with atomic_folder(folder) as temporary:
            build_zip(BUILDS[name], temporary / "emoji.zip", progress)
            copy_licences(_sources(BUILDS[name]), temporary / "licenses")
    return folder / "emoji.zip"


def build_zip(build: EmojiBuild, path: Path, progress: bool = False) -> None:
    """Writes the zip of a build to `path`, atomically."""
    emoji = read_emoji(build.tones)
    drawings = {style: find_drawings(style, build.size) for style in build.styles}
    keys = {style: [one.key for one in emoji if one.key in drawings[style]] for style in build.styles}
    drawn = {key for style in build.styles for key in keys[style]}
    index = _index(build, [one for one in emoji if one.key in drawn], keys)
    bar = tqdm(total=sum(map(len, keys.values())), desc="drawing emoji", disable=not progress)
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive, bar:
        add_file(archive, "emoji.json", json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode())
        for style in build.styles:
            for sheet, start in enumerate(range(0, len(keys[style]), SHEET)):
                chunk = keys[style][start : start + SHEET]
                add_file(
                    archive, f"{style}/{sheet:03d}.webp", _sheet((drawings[style][key] for key in chunk), build.size)
                )
                bar.update(len(chunk))


def copy_licences(sources: Iterable[Source], folder: Path) -> None:
    """Puts our texts and those that the packages bring into `folder`."""
    shutil.copytree(LICENCES, folder)
    for source in sources:
        for text in sorted(source.folder().glob("LICEN[CS]E*")):
            shutil.copyfile(text, folder / f"{source.folder().name}-{text.name}")


def _sources(build: EmojiBuild) -> list[Source]:
    return [CAPTIONS, *dict.fromkeys(style_source(style, build.size) for style in build.styles)]


def _index(build: EmojiBuild, emoji: list[Emoji], keys: dict[str, list[str]]) -> dict:
    return {
        "format": 1,
        "size": build.size,
        "sheet": SHEET,
        "sources": [describe(source) for source in _sources(build)],
        "held_out": sorted({one.concept for one in emoji if is_held_out(one.concept)}),
        "emoji": [[one.key, one.concept, one.label, list(one.tags), one.group, one.subgroup] for one in emoji],
        "styles": keys,
    }


def describe(source: Source) -> dict[str, str]:
    """What a prepared set says of a package that it was made from."""
    return {"package": source.package, "version": source.version, "licence": source.licence, "author": source.author}


def _sheet(drawings: Iterable[Path | str], size: int) -> bytes:
    pictures = np.concatenate([rasterise(drawing, size) for drawing in drawings])  # (pictures * size, size, 4)
    buffer = io.BytesIO()
    Image.fromarray(pictures).save(buffer, "WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def add_file(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Puts a file into a zip, with a fixed time, so that the same content gives the same bytes."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    archive.writestr(entry, content)


def _dataset(name: str, megabytes: int, licence: str, summary: str) -> DatasetInfo:
    where = "npm: " + ", ".join(f"{source.package} {source.version}" for source in _sources(BUILDS[name]))
    return DatasetInfo(
        name=name,
        summary=summary,
        licence=licence,
        where=where,
        megabytes=megabytes,
        location=lambda: prepared_path(name),
        prepare=lambda progress: prepare(name, progress),
    )


_OPEN = "Apache-2.0, CC-BY-4.0, MIT"
DATASETS = {
    info.name: info
    for info in (
        _dataset("emoji", 100, _OPEN, "1,906 emoji in four styles, 64 px; ships with smalti, get makes it anew"),
        _dataset("emoji-tones", 100, _OPEN, "the same with all skin tones"),
        _dataset("emoji-128", 29, _OPEN, "the same at 128 px"),
        _dataset("openmoji", 11, "CC-BY-SA-4.0", "a fifth style, 64 px; share-alike"),
    )
}
