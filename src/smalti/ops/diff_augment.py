"""Augmentation that gradients pass: what a critic sees, of real and of made pictures alike, so that it cannot learn
the real ones by heart, and what it says still reaches the pixels.

In this order: brightness `x + b`, saturation about the mean over channels, contrast about the mean of the picture,
a translation by up to an eighth of the side with zeros entering, and, if asked for, a square hole.

Source: DiffAugment (arXiv 2006.10738), section 3.3 and its code: policy "color,translation,cutout". Its randomness is
given here, so that a training can be repeated however its batches are split.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

DRAWS = 7
"""Uniform numbers a picture: brightness, saturation, contrast, two of the translation, two of the hole."""
REACH = 1 / 8


def diff_augment(x: Tensor, draws: Tensor, hole: float = 0.0) -> Tensor:
    """Augments pictures.

    Args:
        x: pictures (B, C, H, W) in [-1, 1].
        draws: uniform numbers (B, 7) in [0, 1).
        hole: side of the square that is set to 0, over the picture's; 0 = none.

    Returns:
        (B, C, H, W), beyond [-1, 1] where the colours were pushed there.
    """
    brightness, saturation, contrast = (draws[:, i, None, None, None] for i in range(3))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * (contrast + 0.5) + middle
    x = _translate(x, draws[:, 3:5])
    return x * _outside_hole(x, draws[:, 5:7], hole) if hole else x


def _translate(x: Tensor, draws: Tensor) -> Tensor:
    """Each picture moved by whole pixels, zeros entering."""
    height, width = x.shape[-2:]
    rows, columns = (_moved(side, draw) for side, draw in ((height, draws[:, 0]), (width, draws[:, 1])))
    padded = F.pad(x, (1, 1, 1, 1)).movedim(1, -1)  # (B, H+2, W+2, C)
    picture = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[picture, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _moved(side: int, draw: Tensor) -> Tensor:
    """Where each place of a padded side is read from (B, side)."""
    reach = int(side * REACH + 0.5)
    shift = (draw * (2 * reach + 1)).long() - reach
    return (torch.arange(side, device=draw.device) + shift[:, None] + 1).clamp(0, side + 1)


def _outside_hole(x: Tensor, draws: Tensor, hole: float) -> Tensor:
    """Where no hole is (B, 1, H, W): its middle lies anywhere in the picture."""
    inside = torch.ones(len(x), 1, *x.shape[-2:], dtype=torch.bool, device=x.device)
    for axis, side in ((2, x.shape[-2]), (3, x.shape[-1])):
        middle = (draws[:, axis - 2] * side).view(-1, 1, 1, 1)
        place = torch.arange(side, device=x.device).view((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1))
        inside = inside & ((place - middle).abs() <= hole * side / 2)
    return (~inside).to(x.dtype)
