"""Edit masks of pictures: which pixels are to be generated (1) and which are given (0).

Four kinds: a box anywhere; free-form strokes, as of a hand that wipes something out; one half of four; or all but a
window (outpainting). Every mask is drawn by the generator of its sample.

Source: strokes as random walks of a thick brush, Yu et al. (arXiv 1806.03589), supplementary algorithm 1; large masks
of several kinds, LaMa (arXiv 2109.07161), section 2.3; LFM (arXiv 2307.08698) trains with large masks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import Generators
from smalti.core.seeds import rand

KINDS = ("box", "free-form", "half", "outpaint")
STROKES, TURNS = 4, 6
NUMBERS = 2 + STROKES * (4 + TURNS)
"""Uniform numbers that one mask takes, whatever its kind."""


def draw_masks(size: Sequence[int], generator: Generators, samples: int, kinds: Sequence[str] = KINDS) -> Tensor:
    """Masks (B, 1, H, W) of 0 and 1 in float32, each of a kind drawn anew; neither value fills one.

    Args:
        size: (H, W), at least 4 pixels each.
        generator: one for each sample keeps samples free of their batch.
        samples: B.
        kinds: of which are drawn, all alike often: names of `KINDS`.

    Raises:
        UserError: a kind is unknown, or the size is too small.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of mask", kind, KINDS)
    if min(size) < 4 or not kinds:
        raise UserError(f"got a size of {tuple(size)} and {len(kinds)} kinds; give at least 4 pixels a side and 1 kind")
    numbers = rand((samples, 1 + NUMBERS), generator)
    makers = {"box": _box, "free-form": _free_form, "half": _half, "outpaint": _outpaint}
    masks = []
    for one in numbers:
        maker = makers[kinds[min(int(one[0] * len(kinds)), len(kinds) - 1)]]
        mask = maker(size, one[1:])
        if mask.all():  # a hand may wipe out everything; something is always given
            mask[0, 0] = False
        masks.append(mask)
    return torch.stack(masks)[:, None].float()


def shrink_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (B, 1, H, W) on the grid (h, w) of latents by the nearest pixel; they stay 0 and 1."""
    return torch.nn.functional.interpolate(mask, size=tuple(size), mode="nearest-exact")


def hide(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels (B, C, H, W) in [-1, 1] with 0, the middle grey, where the mask (B, 1, H, W) is 1."""
    return pixels * (1 - mask)


def _box(size: Sequence[int], numbers: Tensor) -> Tensor:
    """A rectangle of 40 to 80 % of each side."""
    mask = torch.zeros(*size, dtype=torch.bool)
    top, left, height, width = _window(size, numbers, 0.4, 0.8)
    mask[top : top + height, left : left + width] = True
    return mask


def _outpaint(size: Sequence[int], numbers: Tensor) -> Tensor:
    """All but a window of 40 to 70 % of each side."""
    mask = torch.ones(*size, dtype=torch.bool)
    top, left, height, width = _window(size, numbers, 0.4, 0.7)
    mask[top : top + height, left : left + width] = False
    return mask


def _half(size: Sequence[int], numbers: Tensor) -> Tensor:
    """The upper, lower, left or right half."""
    mask = torch.zeros(*size, dtype=torch.bool)
    dim, is_last = int(numbers[0] * 4) // 2, int(numbers[0] * 4) % 2
    middle = size[dim] // 2
    index = slice(middle, None) if is_last else slice(0, middle)
    mask[(index, slice(None)) if dim == 0 else (slice(None), index)] = True
    return mask


def _free_form(size: Sequence[int], numbers: Tensor) -> Tensor:
    """Strokes: walks that turn, of a round brush of 8 to 20 % of the shorter side."""
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in size)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)  # (H, W, 2)
    mask, side = torch.zeros(*size, dtype=torch.bool), min(size)
    strokes = 1 + int(numbers[0] * STROKES)
    for one in numbers[2:].reshape(STROKES, 4 + TURNS)[:strokes].tolist():
        place, angle = torch.tensor([one[0] * size[0], one[1] * size[1]]), 2 * math.pi * one[2]
        radius = side * (0.04 + 0.06 * one[3])
        for turn in one[4:]:
            angle += (turn - 0.5) * math.pi
            ahead = place + 0.2 * side * torch.tensor([math.sin(angle), math.cos(angle)])
            mask |= _distance(grid, place, ahead) <= max(radius, 1.0)
            place = ahead.clamp(torch.zeros(2), torch.tensor(size) - 1.0)
    return mask


def _distance(grid: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """How far each pixel (H, W, 2) is from a segment (H, W)."""
    along = other - one
    share = ((grid - one) @ along / along.square().sum().clamp_min(1e-12)).clamp(0, 1)
    return (grid - one - share[..., None] * along).norm(dim=-1)


def _window(size: Sequence[int], numbers: Tensor, least: float, most: float) -> tuple[int, int, int, int]:
    """Top, left, height and width of a window whose sides are a share between `least` and `most` of the picture's."""
    share = least + (most - least) * numbers[:2]
    height, width = (max(1, round(side * float(part))) for side, part in zip(size, share, strict=True))
    top, left = (
        int(float(number) * (side - length + 1))
        for number, side, length in zip(numbers[2:4], size, (height, width), strict=True)
    )
    return top, left, height, width
