"""The few shapes of attention maps in video transformers, as modes that whole heads take.

- `full`: every key; `skip`: no output at all, zeros;
- `diagonal`: the frames around the query's own: a band around the diagonal of the map;
- `multi-diagonal`: the places around the query's own in all frames: bands at multiples of the frame's length. Ordered
  place by place they become one band again, whose blocks are rows of places with all their frames;
- `stripes`: the same few keys for all queries: columns of the map.

Widths are shares of the keys, so that a mode means the same on every grid; bands are whole frames (or rows), at least
one, and are moved inwards at the ends: all queries see equally many. Text is attended to by all and attends to all. A
picture has no frames: there both bands are bands of rows, and of tokens where there is one row.

Source: Sparse-vDiT (arXiv 2506.03065), section 4.1. Difference: widths, which are not published; columns lie on an even
lattice unless they were measured.
Shapes: B batch, h heads, L tokens, N of the image, d head_dim, c columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.ops.block_mask import BlockLayout, block_attention, choose
from smalti.ops.token_order import Grid, group_order

Mode = Literal["full", "skip", "diagonal", "multi-diagonal", "stripes"]
MODES: tuple[Mode, ...] = ("full", "skip", "diagonal", "multi-diagonal", "stripes")
CELLS = 8
"""Most cells along an axis of the grid on which measured columns are told."""


@dataclass(frozen=True)
class Patterns:
    """How much of the image's keys each sparse mode keeps, shares in (0, 1].

    Args:
        diagonal: of the frames.
        multi_diagonal: of the rows of places.
        stripes: of the keys.

    Raises:
        UserError: a share out of range.
    """

    diagonal: float = 0.125
    multi_diagonal: float = 0.125
    stripes: float = 0.125

    def __post_init__(self):
        if not all(0 < share <= 1 for share in (self.diagonal, self.multi_diagonal, self.stripes)):
            raise UserError(f"got {self}; every share lies in (0, 1]")


class Band(NamedTuple):
    """A band along one axis of the grid: `count` of its `parts` around every query."""

    axis: int
    parts: int
    count: int


def band(grid: Grid, mode: Mode, patterns: Patterns) -> Band:
    """The band of `diagonal` or `multi-diagonal` on a grid (F, H, W)."""
    axes, share = ((0, 1, 2), patterns.diagonal) if mode == "diagonal" else ((1, 2), patterns.multi_diagonal)
    axis = next((axis for axis in axes if grid[axis] > 1), 2)
    return Band(axis, grid[axis], max(1, round(share * grid[axis])))


def mode_density(mode: Mode, patterns: Patterns, grid: Grid) -> float:
    """Share of image keys that an image query attends to, 1 - S in the paper."""
    if mode in ("full", "skip"):
        return float(mode == "full")
    if mode == "stripes":
        tokens = grid[0] * grid[1] * grid[2]
        return max(1, round(patterns.stripes * tokens)) / tokens
    return band(grid, mode, patterns).count / band(grid, mode, patterns).parts


def mode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: Mode,
    patterns: Patterns,
    grid: Grid,
    before: int = 0,
    mask: Tensor | None = None,
    scale: float | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Attention of heads that share a mode.

    Args:
        q: queries (B, h, L, d).
        k, v: keys and values (B, h, L, d).
        mode: of all these heads.
        patterns: widths.
        grid: (F, H, W) of the image tokens.
        before: text tokens before them; the rest stands after them.
        mask: keys that may be attended to (B, 1, 1, L), bool or an additive bias of that shape; None = all.
        scale: factor on the scores, None = 1 / sqrt(d).
        columns: image tokens that are the stripes (h, c) or (1, c); None = the lattice.

    Returns:
        (B, h, L, d)
    """
    if mode == "skip":
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    if mode == "full":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if mode == "stripes":
        kept = stripe_columns(grid, patterns.stripes) if columns is None else columns
        return _stripes(q, k, v, grid, before, mask, scale, kept.to(q.device))
    after = q.shape[2] - before - grid[0] * grid[1] * grid[2]
    layout = band_layout(grid, band(grid, mode, patterns), before, after)
    backend = choose(layout, q.device)
    backend = "gather" if backend == "flex" and mask is not None else backend
    return block_attention(q, k, v, layout, mask, scale, backend)


@lru_cache(maxsize=64)
def band_layout(grid: Grid, band: Band, before: int = 0, after: int = 0) -> BlockLayout:
    """A band as groups of tokens that share their part of the axis, and a table of groups."""
    group = [1 if axis == band.axis else side for axis, side in enumerate(grid)]
    part = torch.arange(band.parts)
    return BlockLayout(group_order(grid, (group[0], group[1], group[2])), _near(part, part, band), before, after)


def _near(queries: Tensor, keys: Tensor, band: Band) -> Tensor:
    """Which parts lie in the band around others (queries, keys), bool."""
    offset = keys[None] - (queries - band.count // 2).clamp(0, band.parts - band.count)[:, None]
    return (offset >= 0) & (offset < band.count)


def _stripes(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, before: int, mask: Tensor | None, scale: float | None, columns: Tensor
) -> Tensor:
    """Image queries against the columns and all text; text queries against everything."""
    batch, length, tokens = len(q), q.shape[2], grid[0] * grid[1] * grid[2]
    image = slice(before, before + tokens)
    text = torch.cat([torch.arange(before), torch.arange(image.stop, length)]).to(q.device)
    kept = torch.cat([columns + before, text.expand(len(columns), -1)], dim=1)  # (h, c + M)

    def picked(x: Tensor) -> Tensor:
        if len(kept) == 1:
            return x[:, :, kept[0]]
        return x.gather(2, kept[None, ..., None].expand(batch, -1, -1, x.shape[-1]))

    keys = None
    if mask is not None:
        keys = mask.expand(batch, len(kept), 1, length)
        keys = keys.gather(3, kept[None, :, None].expand(batch, -1, -1, -1))
    out = F.scaled_dot_product_attention(q[:, :, image], picked(k), picked(v), attn_mask=keys, scale=scale)
    if not len(text):
        return out
    rows = F.scaled_dot_product_attention(q[:, :, text], k, v, attn_mask=mask, scale=scale)
    return torch.cat([rows[:, :, :before], out, rows[:, :, before:]], dim=2)


@lru_cache(maxsize=256)
def stripe_columns(
    grid: Grid, share: float, cells: tuple[tuple[int, ...], ...] = ((),), measured_on: Grid | None = None
) -> Tensor:
    """Image tokens that are stripes (h, c): those in the cells of every head first, then others on a lattice.

    Args:
        grid: (F, H, W).
        share: of the tokens.
        cells: for every head the cells of `best_cells`; () = the lattice alone.
        measured_on: grid on which the cells were found; None = this one.
    """
    lattice = _lattice(grid)
    count = max(1, round(share * lattice.numel()))
    marked = torch.zeros(len(cells), *cell_grid(measured_on or grid))
    for one, some in zip(marked.flatten(1), cells, strict=True):
        one[list(some)] = 1
    scores = F.interpolate(marked[:, None], size=grid, mode="nearest")[:, 0] - lattice
    return scores.flatten(1).topk(count).indices.sort(1).values


def _lattice(grid: Grid) -> Tensor:
    """Numbers in [0, 1) on a grid (F, H, W) of which the smallest lie evenly, whatever their share.

    They are fractional parts of irrational steps along the axes, 1 / g^i with g^(axes + 1) = g + 1.
    """
    axes, root = sum(side > 1 for side in grid), 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (axes + 1))
    total, power = torch.zeros(grid, dtype=torch.float64), 0
    for axis, side in enumerate(grid):
        power += side > 1
        total += torch.arange(side).reshape([-1 if one == axis else 1 for one in range(3)]) / root**power
    return total % 1


def cell_grid(grid: Grid) -> Grid:
    """The grid of at most 8 x 8 x 8 cells on which measured columns are told, so that they fit other grids, too."""
    return min(grid[0], CELLS), min(grid[1], CELLS), min(grid[2], CELLS)


def best_cells(received: Tensor, grid: Grid, share: float) -> tuple[tuple[int, ...], ...]:
    """For every head the cells that receive most attention.

    Args:
        received: attention that image tokens receive (h, N).
        grid: (F, H, W) of the tokens.
        share: of the cells that are taken.
    """
    cells = F.adaptive_avg_pool3d(received.unflatten(1, grid)[:, None].float(), cell_grid(grid)).flatten(1)
    best = cells.topk(max(1, round(share * cells.shape[1]))).indices.sort(1).values
    return tuple(tuple(one) for one in best.tolist())


def allowed_keys(
    queries: Tensor, mode: Mode, patterns: Patterns, grid: Grid, before: int = 0, after: int = 0,
    columns: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Which keys some queries attend to, token by token: the reference form of a mode.

    Args:
        queries: image tokens (s,), counted from the image's first.
        mode, patterns, grid, before, columns: as in `mode_attention`.
        after: text tokens after the image.

    Returns:
        bool (1 or h, s, before + N + after)
    """
    tokens = torch.arange(grid[0] * grid[1] * grid[2])
    if mode in ("full", "skip"):
        image = torch.full((1, len(queries), len(tokens)), mode == "full")
    elif mode == "stripes":
        kept = stripe_columns(grid, patterns.stripes) if columns is None else columns.cpu()
        image = torch.zeros(len(kept), len(tokens), dtype=torch.bool).scatter_(1, kept, True)
        image = image[:, None].expand(-1, len(queries), -1)
    else:
        one = band(grid, mode, patterns)
        along: Sequence[Tensor] = torch.unravel_index(tokens, grid)
        image = _near(along[one.axis][queries.cpu()], along[one.axis], one)[None]
    return F.pad(image, (before, after), value=mode != "skip").to(queries.device)
