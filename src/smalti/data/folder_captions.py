"""Captions of a folder of pictures: text files beside them and `metadata.jsonl`."""

import json
import posixpath
from dataclasses import dataclass
from pathlib import Path

from smalti.core.errors import UserError

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Skipped:
    """Something that was left out: a path relative to the folder (with a line number in metadata), and why."""

    file: str
    reason: str


def read_captions(root: Path, pictures: list[str], files: list[str], skipped: list[Skipped]) -> dict[str, str]:
    """Captions by picture; what cannot be used is appended to `skipped`.

    Args:
        root: the folder.
        pictures: paths of the pictures relative to it.
        files: paths of all files relative to it.
        skipped: grows by unusable captions and metadata lines.

    Returns:
        The captions that were found; empty if there are none.

    Raises:
        UserError: there are captions, but none of them can be used.
    """
    before = len(skipped)
    found: dict[str, str] = {}
    present = set(files)
    for picture in pictures:
        name = posixpath.splitext(picture)[0] + ".txt"
        if name in present:
            try:
                text = " ".join((root / name).read_text(encoding="utf-8-sig").split())
            except (OSError, UnicodeDecodeError) as error:
                skipped.append(Skipped(name, f"the caption cannot be read: {error}"))
                continue
            if text:
                found[picture] = text
            else:
                skipped.append(Skipped(name, "the caption is empty"))
    for name in files:
        if posixpath.basename(name) == METADATA:
            found.update(_read_metadata(root, name, set(pictures), skipped))
    if not found and len(skipped) > before:
        first = skipped[before]
        raise UserError(f"{root} has captions, but none can be used; the first: {first.file}: {first.reason}")
    return found


def _read_metadata(root: Path, name: str, pictures: set[str], skipped: list[Skipped]) -> dict[str, str]:
    try:
        lines = (root / name).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        skipped.append(Skipped(name, f"the metadata cannot be read: {error}"))
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            picture, text = _entry(line, posixpath.dirname(name), pictures)
            if picture in found:
                raise ValueError(f"{picture} is named twice")
            found[picture] = text
        except ValueError as error:
            skipped.append(Skipped(f"{name}:{number}", str(error)))
    return found


def _entry(line: str, folder: str, pictures: set[str]) -> tuple[str, str]:
    """Picture and caption of one line; `ValueError` says what is wrong with it."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no json: {error.msg}") from error
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("file_name"), str)
        or not isinstance(entry.get("text"), str)
    ):
        raise ValueError('a line must be {"file_name": "...", "text": "..."}')
    text = " ".join(entry["text"].split())
    given = entry["file_name"].replace("\\", "/")
    picture = posixpath.normpath(posixpath.join(folder, given))
    if given.startswith("/") or picture.startswith("../"):
        raise ValueError(f"{given} leaves the folder")
    if picture not in pictures:
        raise ValueError(f"there is no picture {picture}")
    if not text:
        raise ValueError(f"the caption of {picture} is empty")
    return picture, text
