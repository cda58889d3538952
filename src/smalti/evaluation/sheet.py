"""Labelled contact sheets: pictures in rows with their prompts under them."""

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 8


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures of pixels (B, 3, H, W) in [-1, 1]."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def from_images(images: Sequence[Image.Image]) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] of pictures of one size."""
    array = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def sheet(pictures: Sequence[Image.Image], labels: Sequence[str] = (), columns: int = 8, scale: int = 2) -> Image.Image:
    """One picture of many.

    Args:
        pictures: all of one size, at least one.
        labels: text under each, or none at all.
        columns: pictures in a row.
        scale: whole-number magnification.

    Returns:
        The sheet, on white.
    """
    width, height = (side * scale for side in pictures[0].size)
    font = ImageFont.load_default(size=11)
    lines = [textwrap.wrap(label, max(8, width // 6))[:3] for label in labels]
    text_height = 14 * max((len(wrapped) for wrapped in lines), default=0)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell = (width + MARGIN, height + text_height + MARGIN)
    canvas = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for index, picture in enumerate(pictures):
        x, y = MARGIN + index % columns * cell[0], MARGIN + index // columns * cell[1]
        canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, y))
        for row, line in enumerate(lines[index] if index < len(lines) else ()):
            draw.text((x + width / 2, y + height + 2 + 14 * row), line, fill="black", font=font, anchor="ma")
    return canvas
