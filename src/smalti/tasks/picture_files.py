"""Pictures as PNG files with their settings in the metadata; clips are PNG files that move (APNG)."""

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

PNG_KEY = "smalti"
FRAME_SECONDS = 3  # of a whole clip

Drawn = Image.Image | list[Image.Image]
"""A picture, or the frames of a clip."""


def first_picture(image: Drawn) -> Image.Image:
    """A picture, or a clip's first frame."""
    return image[0] if isinstance(image, list) else image


def save_picture(path: Path, image: Drawn, settings: dict[str, Any]) -> None:
    """A PNG with its settings in its metadata; the same settings give the same bytes."""
    metadata = PngInfo()
    metadata.add_text(PNG_KEY, json.dumps(settings, ensure_ascii=True))
    with path.open("wb") as file:
        if isinstance(image, list):
            moving = {"save_all": True, "append_images": image[1:], "loop": 0}
            image[0].save(file, "PNG", pnginfo=metadata, duration=1000 * FRAME_SECONDS // len(image), **moving)
        else:
            image.save(file, "PNG", pnginfo=metadata)
        file.flush()
        os.fsync(file.fileno())  # a full disk shows here, before any file takes its place


def settings_of(path: Path) -> dict[str, Any] | None:
    """The settings in a PNG's metadata; None if it is no whole picture of ours."""
    try:
        with Image.open(path) as image:
            image.load()
            return json.loads(image.text[PNG_KEY])  # type: ignore[attr-defined]  # PNG files have it
    except (OSError, SyntaxError, AttributeError, KeyError, ValueError):
        return None
