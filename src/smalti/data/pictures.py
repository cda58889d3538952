"""Reading one picture file of any origin: checked, upright, on white.

PNG, JPEG and WebP; the first frame of an animation; palette, grey, 16-bit and CMYK pictures become RGB. A picture of
more than `LARGEST_PIXELS` is refused before it is decoded (decompression bombs).
"""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST_PIXELS = 100_000_000


class UnreadablePicture(ValueError):
    """A file that is no whole picture; the message says why."""


def read_picture(path: Path) -> Image.Image:
    """Decodes a whole file to upright RGB on white.

    Raises:
        UnreadablePicture: the file is missing, empty, torn, too large or no PNG, JPEG or WebP.
    """
    try:
        if not path.is_file():  # also pipes and devices, which would block
            raise UnreadablePicture("it is no regular file" if path.exists() else "the file is missing")
        if path.stat().st_size == 0:
            raise UnreadablePicture("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb and metadata warnings; our limit is stricter
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > LARGEST_PIXELS:
                    raise UnreadablePicture(f"too large: {file.width} x {file.height} pixels")
                return _on_white(ImageOps.exif_transpose(file))  # decodes the whole file
    except UnreadablePicture:
        raise
    except Exception as error:  # damaged files make decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise UnreadablePicture(_reason(error)) from error


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: keep the upper byte
        picture = Image.fromarray((np.asarray(picture).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no PNG, JPEG or WebP picture"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: over {LARGEST_PIXELS} pixels"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]
