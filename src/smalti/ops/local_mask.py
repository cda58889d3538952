"""Local masks as groups of tokens: every group attends to itself and to the groups around it.

The tokens of a grid (F, H, W) are flattened row by row and cut into runs of `g`; a run attends to the `n` runs around
it, n odd, so that a share n g / N of the keys is left. At the ends the n runs are moved inwards: all see equally many.

- `band`: runs of the whole flattened order, rows after rows and frames after frames;
- `window`: rectangles of rows and columns, at the same place in all frames;
- `frames`: runs of the order within a frame, at the same place in all frames.

`g` and `n` are those that come nearest to the wanted share, with a liking for few, long runs (every attended run is a
copy of its keys), no padding, and whole tiles of FlexAttention; `attended` tells the share that was reached. A picture
is a video of one frame.
"""

import math
from functools import lru_cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from smalti.ops.block_mask import TILE, BlockLayout
from smalti.ops.token_order import Grid, group_order

Mask = Literal["band", "window", "frames"]
MASKS = ("band", "window", "frames")
COUNTS = (3, 5, 7, 9)
"""Runs attended to along an axis: with fewer the band is lopsided within a run, with more the runs are short."""


@lru_cache(maxsize=64)
def local_layout(grid: Grid, mask: Mask, density: float, before: int = 0, after: int = 0) -> BlockLayout:
    """Groups and attended groups of a grid of tokens.

    Args:
        grid: (F, H, W) of the image tokens.
        mask: band, window or frames.
        density: wanted share of image keys, in (0, 1].
        before, after: text tokens before and after the image.
    """
    frames, rows, columns = grid
    if mask == "window":
        places, axes = grid, (1, 2)
    else:
        places, axes = ((1, 1, math.prod(grid)) if mask == "band" else (frames, 1, rows * columns)), (2,)
    runs = _runs(tuple(places[axis] for axis in axes), density)
    group, counts = [places[0], 1, 1], [1, 1, 1]
    for axis, (length, count) in zip(axes, runs, strict=True):
        group[axis], counts[axis] = length, count
    order = group_order(places, (group[0], group[1], group[2]))
    table = torch.ones(1, 1, dtype=torch.bool)
    for parts, count in zip(order.groups, counts, strict=True):
        table = torch.kron(table, _around(parts, count))
    return BlockLayout(order, table, before, after)


@lru_cache(maxsize=64)
def attended(layout: BlockLayout) -> float:
    """Share of image keys that a mean image query attends to, padded places not counted."""
    tokens = layout.order.is_real.unflatten(0, (layout.order.count, -1)).sum(1).double()
    return float(tokens @ layout.table.double() @ tokens / tokens.sum() ** 2)


def _around(parts: int, count: int) -> Tensor:
    """Which of so many parts each attends to (parts, parts): `count` around it, moved inwards at the ends."""
    count = min(count, parts)
    start = (torch.arange(parts) - count // 2).clamp(0, parts - count)
    offset = torch.arange(parts)[None] - start[:, None]
    return (offset >= 0) & (offset < count)


def _runs(sides: tuple[int, ...], density: float) -> tuple[tuple[int, int], ...]:
    """For every axis the length of a run and the number of runs attended to."""

    def options(side: int) -> list[tuple[int, int]]:
        found = [(length, count) for count in COUNTS for length in range(1, side // count + 1)]
        return [*found, (side, 1)]

    def fault(runs: tuple[tuple[int, int], ...]) -> float:
        widths = [length * count for length, count in runs]
        share = math.prod(widths) / math.prod(sides)
        is_padded = any(side % length for side, (length, _) in zip(sides, runs, strict=True))
        is_tiled = not is_padded and math.prod(length for length, _ in runs) % TILE == 0
        most = max(count for _, count in runs)
        oblong = abs(math.log(widths[0] / widths[-1]))
        return abs(share / density - 1) + 0.04 * most + 0.1 * is_padded - 0.15 * is_tiled + 0.2 * oblong

    return min(product(*map(options, sides)), key=fault)
