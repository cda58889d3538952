"""Attention within a circle: an image query attends to the image keys around it, to all text, and to nothing else.

    near(q, k) = (row(q) - row(k))^2 + (column(q) - column(k))^2 < radius^2

The inequality is strict and nothing wraps at a border, where queries see fewer keys. Text attends to all and is
attended to by all. Frames of a clip do not count in the distance: a query sees the same circle in every frame. Pooled
keys (cells of `pool` x `pool` tokens, one key and value each) may stand behind the sequence, for image queries alone.

The circle lies on groups of tokens (`ops.token_order`): a table says which groups any token of a group needs, those are
gathered, and the exact circle masks what was gathered (`gather`). On a GPU groups are the tiles of FlexAttention, which
are full, partly filled or left out (`flex`). `dense`, plain attention under the token mask, is the reference.

Source: CLEAR (arXiv 2412.16112), section 3.2. The square is a comparator of ours.
Letters: N image tokens, M text tokens, L = M + N, P pooled keys, G groups of g tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex

from smalti.ops.block_mask import TILE, BlockLayout
from smalti.ops.token_order import Grid, group_order

Backend = Literal["dense", "gather", "flex"]
Shape = Literal["circle", "square"]
TILES: Grid = (1, 8, 16)
"""Rows and columns of a group that is one tile."""


class Pooled(NamedTuple):
    """Keys and values of cells (B, h, P, d)."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class CircleLayout:
    """Who sees whom, made once a shape by `circle_layout` and kept.

    Args:
        blocks: groups, the groups that they need, and the text.
        radius: in tokens; a square reaches as far along both axes.
        shape: circle, or square.
    """

    blocks: BlockLayout
    radius: float
    shape: Shape = "circle"
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """Whether every image token sees every other."""
        _, rows, columns = self.blocks.order.grid
        return bool(is_near(torch.tensor(rows - 1), torch.tensor(columns - 1), self.radius, self.shape))

    def near(self, device: torch.device) -> Tensor:
        """The exact mask of what is gathered for each group (G, g, n*g): queries by keys, padding left out."""
        if device not in self.kept:
            order, neighbours = self.blocks.order, self.blocks.neighbours
            rows, columns = (place[order.index].unflatten(0, (order.count, -1)) for place in _places(order.grid))
            real = order.is_real.unflatten(0, (order.count, -1))
            safe = neighbours.clamp_min(0)
            keys = real[safe] & (neighbours >= 0)[..., None]  # (G, n, g)
            down = rows[:, :, None] - rows[safe].flatten(1)[:, None]  # (G, g, n*g)
            right = columns[:, :, None] - columns[safe].flatten(1)[:, None]
            # Padded queries are dropped; they see the keys there are, so that no row is empty.
            found = (is_near(down, right, self.radius, self.shape) | ~real[..., None]) & keys.flatten(1)[:, None]
            self.kept[device] = found.to(device)
        return self.kept[device]


def is_near(down: Tensor, right: Tensor, radius: float, shape: Shape = "circle") -> Tensor:
    """Whether keys so many rows and columns away lie in the circle (or square)."""
    if shape == "square":
        return (down.abs() < radius) & (right.abs() < radius)
    return down.square() + right.square() < radius**2


@lru_cache(maxsize=64)
def circle_mask(
    grid: Grid, radius: float, before: int = 0, after: int = 0, pooled: int = 0, shape: Shape = "circle"
) -> Tensor:
    """The token mask (L, L + P), True = attend: the reference.

    Args:
        grid: (F, H, W) of the image tokens.
        radius: in tokens.
        before, after: text tokens before and after the image.
        pooled: P.
        shape: circle or square.
    """
    rows, columns = _places(grid)
    image = slice(before, before + len(rows))
    mask = torch.ones(image.stop + after, image.stop + after, dtype=torch.bool)
    mask[image, image] = is_near(rows[:, None] - rows, columns[:, None] - columns, radius, shape)
    of_pooled = torch.zeros(len(mask), pooled, dtype=torch.bool)
    of_pooled[image] = True
    return torch.cat([mask, of_pooled], dim=1)


@lru_cache(maxsize=64)
def circle_layout(
    grid: Grid,
    radius: float,
    before: int = 0,
    after: int = 0,
    shape: Shape = "circle",
    group: Grid | None = None,
) -> CircleLayout:
    """Groups and the groups that they need.

    Args:
        grid: (F, H, W) of the image tokens.
        radius: in tokens, above 0.
        before, after: text tokens before and after the image.
        shape: circle or square.
        group: tokens of a group; None = squares as wide as the reach: smaller ones gather fewer keys in vain, but every
            gathered key is a copy.
    """
    if group is None:
        reach = max(1, math.ceil(min(radius, max(grid))) - 1)
        side = 2 ** math.ceil(math.log2(reach))
        group = (1, side, side)
    order = group_order(grid, group)
    _, rows, columns = order.groups
    down = _gaps(rows, order.group[1])[:, None, :, None]
    right = _gaps(columns, order.group[2])[None, :, None, :]
    in_frame = is_near(down, right, radius, shape).reshape(rows * columns, rows * columns)
    table = in_frame.repeat(order.groups[0], order.groups[0])  # the same in every frame
    return CircleLayout(BlockLayout(order, table, before, after), radius, shape)


def circle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: CircleLayout,
    mask: Tensor | None = None,
    scale: float | None = None,
    pooled: Pooled | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention within the circle.

    Args:
        q: queries (B, h, L, d).
        k, v: keys and values (B, h, L, d).
        layout: of the tokens.
        mask: keys that may be attended to (B or 1, 1, 1, L), bool or an additive bias; None = all.
        scale: factor on the scores, None = 1 / sqrt(d).
        pooled: further keys and values that image queries see.
        backend: how; None = `choose`.

    Returns:
        (B, h, L, d)

    Raises:
        ValueError: a mask of another shape, or one where FlexAttention is asked for.
    """
    if mask is not None and (mask.ndim != 4 or mask.shape[-2] != 1 or mask.shape[-3] != 1):
        raise ValueError(f"a mask of keys is (B, 1, 1, L), got {tuple(mask.shape)}")
    if backend is None:
        backend = choose(layout, q.device, 0 if pooled is None else pooled.k.shape[2], mask)
    if backend == "flex":
        if mask is not None:
            raise ValueError("the flex path takes no mask of keys; cut padded text off, or choose gather")
        return _flex(q, k, v, layout, scale, pooled)
    return (_dense if backend == "dense" else _gather)(q, k, v, layout, mask, scale, pooled)


def tiles_for(grid: Grid, device: torch.device, mask: Tensor | None = None) -> Grid | None:
    """Groups that FlexAttention can run on, where it runs: on a GPU, a grid of whole tiles, no mask of keys."""
    is_tiled = grid[1] % TILES[1] == 0 and grid[2] % TILES[2] == 0
    return TILES if device.type == "cuda" and is_tiled and mask is None else None


def choose(layout: CircleLayout, device: torch.device, pooled: int = 0, mask: Tensor | None = None) -> Backend:
    """Tiles on a GPU, gathered keys where these are fewer than all, else the token mask, by products."""
    order = layout.blocks.order
    if device.type == "cuda" and mask is None and order.length % TILE == 0 and not order.is_padded:
        return "flex"
    text, tokens = layout.blocks.before + layout.blocks.after, len(order.inverse)
    gathered = layout.blocks.neighbours.shape[1] * order.length + text + pooled
    gathered = order.count * order.length * gathered + text * (tokens + text)
    return "gather" if gathered < (tokens + text) * (tokens + text + pooled) else "dense"


def pool_tokens(x: Tensor, grid: Grid, weight: Tensor) -> Tensor:
    """Weighted sums over cells of s x s tokens in each frame.

    A cell that the border cuts has only the tokens that exist, weighted as many times more as there are fewer.

    Args:
        x: keys or values of the image (B, h, N, d), after norm and rotation.
        grid: (F, H, W).
        weight: (s, s), one for keys and values of all heads; 1 / s^2 everywhere is the mean.

    Returns:
        (B, h, P, d)
    """
    side = len(weight)
    order = group_order(grid, (1, side, side))
    real = order.is_real.unflatten(0, (order.count, -1)).to(x.device)
    factor = weight[: order.group[1], : order.group[2]].flatten() * real  # (P, s*s)
    factor = factor * (side**2 / real.sum(1, keepdim=True))
    return torch.einsum("bhpsd,ps->bhpd", order.gather(x), factor.to(x.dtype))


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: CircleLayout,
    mask: Tensor | None,
    scale: float | None,
    pooled: Pooled | None,
) -> Tensor:
    blocks, extra = layout.blocks, 0 if pooled is None else pooled.k.shape[2]
    key = (q.device, extra)
    if key not in layout.kept:
        found = circle_mask(blocks.order.grid, layout.radius, blocks.before, blocks.after, extra, layout.shape)
        layout.kept[key] = found.to(q.device)
    allowed = layout.kept[key]
    if mask is not None:
        allowed = _both(allowed, F.pad(mask, (0, extra), value=True if mask.dtype == torch.bool else 0.0))
    if pooled is not None:
        k, v = torch.cat([k, pooled.k], 2), torch.cat([v, pooled.v], 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def _gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: CircleLayout,
    mask: Tensor | None,
    scale: float | None,
    pooled: Pooled | None,
) -> Tensor:
    """Groups as batch: queries (B*G, h, g, d) against the keys of n groups, the text and the cells."""
    blocks, order, (batch, heads) = layout.blocks, layout.blocks.order, q.shape[:2]
    safe = blocks.neighbours.clamp_min(0).to(q.device)
    count, needed = safe.shape

    def outside(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, : blocks.before], x[:, :, blocks.image.stop :]], dim=2)

    def keys(x: Tensor, cells: Tensor | None) -> Tensor:
        picked = order.gather(x[:, :, blocks.image])[:, :, safe.flatten()]
        picked = picked.reshape(batch, heads, count, needed * order.length, -1)
        shared = outside(x) if cells is None else torch.cat([outside(x), cells], dim=2)
        shared = shared[:, :, None].expand(-1, -1, count, -1, -1)
        return torch.cat([picked, shared], dim=3).transpose(1, 2).flatten(0, 1)

    extra = 0 if pooled is None else pooled.k.shape[2]
    others = blocks.before + blocks.after + extra
    allowed = F.pad(layout.near(q.device), (0, others), value=True)[None]  # (1, G, g, K)
    if mask is not None:
        key_mask = mask.expand(batch, 1, 1, -1)[:, :, 0, :, None]  # (B, 1, L, 1)
        image = order.gather(key_mask[:, :, blocks.image])[:, 0, safe, :, 0].flatten(2)  # (B, G, n*g)
        rest = outside(key_mask)[:, :, :, 0].expand(-1, count, -1)
        rest = F.pad(rest, (0, extra), value=True if mask.dtype == torch.bool else 0.0)
        allowed = _both(allowed, torch.cat([image, rest], dim=2)[:, :, None])
    allowed = allowed.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]  # (B*G, 1, g, K)
    queries = order.gather(q[:, :, blocks.image]).transpose(1, 2).flatten(0, 1)
    of_pooled = (None, None) if pooled is None else pooled
    out = F.scaled_dot_product_attention(
        queries, keys(k, of_pooled[0]), keys(v, of_pooled[1]), attn_mask=allowed, scale=scale
    )
    image = order.scatter(out.unflatten(0, (batch, count)).transpose(1, 2))
    if not blocks.before and not blocks.after:
        return image
    text = F.scaled_dot_product_attention(outside(q), k, v, attn_mask=mask, scale=scale)
    return torch.cat([text[:, :, : blocks.before], image, text[:, :, blocks.before :]], 2)


def _both(allowed: Tensor, mask: Tensor) -> Tensor:
    """A bool mask and one of keys, bool or a bias, as one."""
    if mask.dtype == torch.bool:
        return allowed & mask
    return torch.zeros_like(allowed, dtype=mask.dtype).masked_fill(~allowed, -torch.inf) + mask


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex.flex_attention, dynamic=False)  # without a compiler it computes every score


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: CircleLayout, scale: float | None, pooled: Pooled | None) -> Tensor:
    """Image tokens group by group, then text, then cells."""
    blocks, order = layout.blocks, layout.blocks.order
    index, inverse = order.index.to(q.device), order.inverse.to(q.device)

    def ordered(x: Tensor, *cells: Tensor) -> Tensor:
        image = x[:, :, blocks.image][:, :, index]
        return torch.cat([image, x[:, :, : blocks.before], x[:, :, blocks.image.stop :], *cells], dim=2)

    extra, cells = (0, ((), ())) if pooled is None else (pooled.k.shape[2], ((pooled.k,), (pooled.v,)))
    tiles = flex_mask(layout, extra, q.device)
    out = _compiled_flex()(ordered(q), ordered(k, *cells[0]), ordered(v, *cells[1]), block_mask=tiles, scale=scale)
    text, image = out[:, :, len(index) :], out[:, :, : len(index)][:, :, inverse]
    return torch.cat([text[:, :, : blocks.before], image, text[:, :, blocks.before :]], 2)


def flex_mask(layout: CircleLayout, pooled: int, device: torch.device) -> flex.BlockMask:
    """FlexAttention's mask, from rectangles of tokens and not token by token: the groups are whole tiles.

    Raises:
        ValueError: the groups are no whole tiles.
    """
    key = ("flex", pooled, device)
    if key not in layout.kept:
        order, text = layout.blocks.order, layout.blocks.before + layout.blocks.after
        if order.length % TILE or order.is_padded:
            raise ValueError(f"groups of {order.group} on a grid {order.grid} are no whole tiles of {TILE} tokens")
        rows, columns = (place[order.index].to(device) for place in _places(order.grid))
        tokens, radius, shape = len(order.index), layout.radius, layout.shape
        last = tokens - 1

        def keep(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            one, other = query.clamp(max=last), key.clamp(max=last)
            close = is_near(rows[one] - rows[other], columns[one] - columns[other], radius, shape)
            return torch.where(query < tokens, (key >= tokens) | close, key < tokens + text)

        some, whole = _tiles(layout, rows, columns, text, pooled)
        part_count, part_index = _ranked(some & ~whole)
        whole_count, whole_index = _ranked(whole)
        layout.kept[key] = flex.BlockMask.from_kv_blocks(
            part_count, part_index, whole_count, whole_index, BLOCK_SIZE=TILE, mask_mod=keep,
            seq_lengths=(tokens + text, tokens + text + pooled),
        )  # fmt: skip
    return layout.kept[key]


def _tiles(layout: CircleLayout, rows: Tensor, columns: Tensor, text: int, pooled: int) -> tuple[Tensor, Tensor]:
    """Which tiles of queries and keys are needed at all, and which wholly."""
    count = len(rows) // TILE

    def gaps(place: Tensor) -> tuple[Tensor, Tensor]:
        low, high = place.unflatten(0, (count, TILE)).aminmax(dim=1)
        over = low[:, None] - high[None]
        return torch.maximum(over, over.T).clamp_min(0), torch.maximum(high[:, None] - low, high - low[:, None])

    (down, most_down), (right, most_right) = gaps(rows), gaps(columns)
    some = is_near(down, right, layout.radius, layout.shape)
    whole = is_near(most_down, most_right, layout.radius, layout.shape)
    kinds = torch.tensor([1] * text + [2] * pooled, device=rows.device)  # behind the image: text, cells, nothing
    kinds = F.pad(kinds, (0, -len(kinds) % TILE), value=3).unflatten(0, (-1, TILE))
    queries = -(-text // TILE)
    grown = F.pad(some, (0, len(kinds), 0, queries), value=True)
    full = F.pad(whole, (0, len(kinds), 0, queries), value=True)
    full[:count, count:] = (kinds != 3).all(1)
    grown[count:, count:] = (kinds == 1).any(1)
    full[count:, count:] = (kinds == 1).all(1)
    return grown, full & grown


def _ranked(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of tiles a row (1, 1, rows), and their columns first in each row (1, 1, rows, columns)."""
    columns = tiles.int().argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


def _places(grid: Grid) -> tuple[Tensor, Tensor]:
    """Row and column of every token (N,)."""
    frames, rows, columns = grid
    place = torch.arange(rows * columns).repeat(frames)
    return place // columns, place % columns


def _gaps(parts: int, length: int) -> Tensor:
    """The least distance between tokens of two parts of an axis (parts, parts)."""
    apart = (torch.arange(parts)[:, None] - torch.arange(parts)).abs()
    return ((apart - 1) * length + 1).clamp_min(0) * (apart > 0)
