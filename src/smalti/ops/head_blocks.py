"""Block-sparse attention with a table for every head of every sample, fixed or decided while it runs.

As in `ops.block_mask`, image tokens stand in groups, text before or after the image is attended to by all and attends
to all, and a mask of keys holds for everybody. Here each head has its own table, and rows may attend to unequally many
groups, so that nothing can be prepared once a shape.

Three ways to compute the same: `gather` sorts the queries' groups by how many groups they attend to and runs one dense
attention for each number, without any padding (CPU and GPU); `flex` gives FlexAttention a block mask made from the
table (GPU, groups of a multiple of 128 tokens); `dense` is plain attention with the table as a token mask: the
reference. A gathered key serves the queries of one group alone, so that on a CPU it pays in seconds for groups of about
64 tokens and more; `choose` counts products, not seconds.

Source: DraftAttention (arXiv 2505.14708), section 4; FlexAttention (arXiv 2412.05496) for the block mask.
Shapes: B batch, h heads, G groups of g places, L tokens, M of them text, d head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex
from torch.utils._pytree import tree_leaves

from smalti.ops.block_mask import TILE, Backend
from smalti.ops.token_order import GroupOrder

GATHERED = 2**20
"""Numbers of gathered keys in one piece of the gather path on a CPU, which should stay in its cache."""
MOST = 2**15
"""Rows in one piece; attention kernels take fewer than 2^16 at once."""


@dataclass(frozen=True, eq=False)
class HeadBlocks:
    """Where tokens stand and which groups attend to which, made by `head_blocks`; what is derived from it is kept.

    Args:
        order: groups of the image tokens.
        table: which groups a group attends to (B, h, G, G), bool; B and h may be 1.
        before: text tokens before the image.
        after: text tokens after it.
    """

    order: GroupOrder
    table: Tensor
    before: int = 0
    after: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def image(self) -> slice:
        """Where the image tokens stand."""
        return slice(self.before, self.before + len(self.order.inverse))

    @property
    def attended(self) -> float:
        """Share of groups that a mean group attends to; waits for the device."""
        return float(self.table.float().mean())

    @property
    def text(self) -> Tensor:
        """Where the text tokens stand (M,)."""
        return torch.cat([torch.arange(self.before), torch.arange(self.image.stop, self.image.stop + self.after)])

    @property
    def nbytes(self) -> int:
        """Bytes of the table and of what was derived from it."""
        derived = [one.as_tuple() if isinstance(one, flex.BlockMask) else one for one in self.kept.values()]
        return sum(one.nbytes for one in tree_leaves([self.table, derived]) if isinstance(one, Tensor))

    def joined(self, image: Tensor, text: Tensor) -> Tensor:
        """Image (..., N, d) and text tokens (..., M, d) where they stood (..., L, d)."""
        return torch.cat([text[..., : self.before, :], image, text[..., self.before :, :]], dim=-2)


def head_blocks(order: GroupOrder, table: Tensor, before: int = 0, after: int = 0) -> HeadBlocks:
    """Blocks of a table (B, h, G, G); every group attends at least to itself, so that no row is empty.

    Raises:
        ValueError: a table of another shape or dtype.
    """
    count = order.count
    if table.ndim != 4 or table.shape[2:] != (count, count) or table.dtype != torch.bool:
        raise ValueError(
            f"a table of {count} groups is bool (B, h, {count}, {count}), got {table.dtype} {tuple(table.shape)}"
        )
    return HeadBlocks(order, table | torch.eye(count, dtype=torch.bool, device=table.device), before, after)


def head_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: HeadBlocks,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention in which the image queries of each head attend to the groups of its table and to all text.

    Args:
        q: queries (B, h, L, d).
        k, v: keys and values (B, h, L, d).
        blocks: groups, table and text.
        mask: keys that may be attended to (B, 1, 1, L), bool or an additive bias of that shape; None = all.
        scale: factor on the scores, None = 1 / sqrt(d).
        backend: how; None = `choose`.

    Returns:
        (B, h, L, d)

    Raises:
        ValueError: a mask of another shape, or a bias with `flex`.
    """
    if mask is not None and (mask.ndim != 4 or mask.shape[-2] != 1 or mask.shape[-3] != 1):
        raise ValueError(f"a mask of keys is (B, 1, 1, L), got {tuple(mask.shape)}")
    if backend is None:
        share = blocks.attended
        backend = choose(blocks.order, share, blocks.before + blocks.after, q.device, mask)
    if backend == "full":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if backend == "dense":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=token_mask(blocks, q.device, mask), scale=scale)
    return (_flex if backend == "flex" else _gather)(q, k, v, blocks, mask, scale)


def choose(order: GroupOrder, share: float, text: int, device: torch.device, mask: Tensor | None = None) -> Backend:
    """The cheapest way: `full` where the sparse ways would compute as much as plain attention.

    Args:
        order: groups of the image tokens.
        share: of the groups that a mean group attends to.
        text: number of text tokens.
        device: where it runs.
        mask: of keys; a bias keeps `flex` from being chosen.
    """
    if sparse_cost(order, share, text) >= 1:
        return "full"
    is_bool = mask is None or mask.dtype == torch.bool
    return "flex" if device.type == "cuda" and order.length % TILE == 0 and is_bool else "gather"


def sparse_cost(order: GroupOrder, share: float, text: int) -> float:
    """Score products of the gather path over those of plain attention, padding and text rows counted."""
    places, length = len(order.index), len(order.inverse) + text
    return (places * (share * places + text) + text * length) / length**2


def token_mask(blocks: HeadBlocks, device: torch.device, mask: Tensor | None = None) -> Tensor:
    """Which token attends to which (B, h, L, L), text and mask of keys included: the reference form."""
    group = (blocks.order.inverse // blocks.order.length).to(device)  # (N,)
    image = blocks.table.to(device)[:, :, group][..., group]
    allowed = F.pad(image, (blocks.before, blocks.after, blocks.before, blocks.after), value=True)
    if mask is None or mask.dtype == torch.bool:
        return allowed if mask is None else allowed & mask
    return torch.zeros_like(allowed, dtype=mask.dtype).masked_fill(~allowed, -torch.inf) + mask


class _Bucket(NamedTuple):
    """Rows that attend to equally many groups.

    Args:
        rows: places in the list of all groups of all heads of all samples (n,).
        groups: which groups they attend to (n, c).
    """

    rows: Tensor
    groups: Tensor


def _buckets(blocks: HeadBlocks, batch: int, heads: int, device: torch.device) -> list[_Bucket]:
    """All rows by the number of groups they attend to; waits for the device."""
    key = ("gather", batch, heads, device)
    if key not in blocks.kept:
        table = blocks.table.to(device).expand(batch, heads, -1, -1).flatten(0, 2)  # (B*h*G, G)
        sizes, rows = table.sum(1).sort(stable=True)
        columns = table[rows].nonzero()[:, 1]  # row after row, as many as the row's size
        numbers, repeats = sizes.unique_consecutive(return_counts=True)
        lengths = (numbers * repeats).tolist()
        numbers, repeats = numbers.tolist(), repeats.tolist()
        blocks.kept[key] = [
            _Bucket(members, groups.unflatten(0, (-1, number)))
            for number, members, groups in zip(numbers, rows.split(repeats), columns.split(lengths), strict=True)
        ]
    return blocks.kept[key]


def _gather(q: Tensor, k: Tensor, v: Tensor, blocks: HeadBlocks, mask: Tensor | None, scale: float | None) -> Tensor:
    """Rows as batch: q (n, 1, g, d) against the tokens of their c groups and the text (n, 1, c*g + M, d)."""
    order, (batch, heads, length, width) = blocks.order, q.shape
    device, count, text = q.device, order.count, blocks.text.to(q.device)
    places = (order.index.to(device) + blocks.before).unflatten(0, (count, order.length))  # (G, g)
    queries, keys, values = (x.flatten(0, 2) for x in (q, k, v))  # (B*h*L, d)
    allowed = _allowed(blocks, mask, batch, device)
    room = GATHERED if device.type == "cpu" else 2**8 * GATHERED
    parts, buckets = [], _buckets(blocks, batch, heads, device)
    for bucket in buckets:
        piece = room // ((bucket.groups.shape[1] * order.length + len(text)) * width)
        piece = min(max(1, piece), MOST)
        for rows, groups in zip(bucket.rows.split(piece), bucket.groups.split(piece), strict=True):
            first = (rows // count * length)[:, None]  # token of its head in the list
            asked = first + torch.cat([places[groups].flatten(1), text.expand(len(rows), -1)], dim=1)
            asking = first + places[rows % count]
            given = (
                x.index_select(0, index.flatten()).unflatten(0, index.shape)[:, None]
                for x, index in ((queries, asking), (keys, asked), (values, asked))
            )
            part = None if allowed is None else _picked(allowed, rows // (heads * count), groups, order)
            parts.append(F.scaled_dot_product_attention(*given, attn_mask=part, scale=scale)[:, 0])
    back = torch.cat([bucket.rows for bucket in buckets]).argsort()
    image = order.scatter(torch.cat(parts)[back].unflatten(0, (batch, heads, count)))
    if not len(text):
        return image
    return blocks.joined(image, F.scaled_dot_product_attention(q[:, :, text], k, v, attn_mask=mask, scale=scale))


def _allowed(blocks: HeadBlocks, mask: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    """What counts of every place of the groups and then of the text (B, G*g + M); None if everything does."""
    order = blocks.order
    if mask is None and not order.is_padded:
        return None
    real = F.pad(order.is_real.to(device), (0, len(blocks.text)), value=True)
    if mask is None:
        return real.expand(batch, -1)
    index = torch.cat([order.index + blocks.before, blocks.text]).to(device)
    keys = mask.expand(batch, -1, -1, -1)[:, 0, 0, index]
    return keys & real if mask.dtype == torch.bool else keys.masked_fill(~real, -torch.inf)


def _picked(allowed: Tensor, sample: Tensor, groups: Tensor, order: GroupOrder) -> Tensor:
    """The mask of gathered keys (n, 1, 1, c*g + M)."""
    image, text = allowed.split([len(order.index), allowed.shape[1] - len(order.index)], dim=1)
    picked = image.unflatten(1, (order.count, order.length))[sample[:, None], groups].flatten(1)
    return torch.cat([picked, text[sample]], dim=1)[:, None, None]


@lru_cache(maxsize=1)
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled once a shape; other tables of that shape need no compiling."""
    return torch.compile(flex.flex_attention, dynamic=False)  # type: ignore[return-value]


def _flex(q: Tensor, k: Tensor, v: Tensor, blocks: HeadBlocks, mask: Tensor | None, scale: float | None) -> Tensor:
    """Image tokens in their order, the text behind them, filled up to whole tiles."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError("the flex path takes a bool mask of keys; choose gather for a bias")
    index = flex_order(blocks).to(q.device)
    key = ("flex", *q.shape[:2], q.device, torch.is_grad_enabled())
    kept = blocks.kept if mask is None else {}
    if key not in kept:
        kept[key] = flex_mask(blocks, q.shape[0], q.shape[1], mask, q.device)
    out = compiled_flex()(*(x[:, :, index] for x in (q, k, v)), block_mask=kept[key], scale=scale)
    places, text = len(blocks.order.index), blocks.before + blocks.after
    return blocks.joined(out[:, :, blocks.order.inverse.to(q.device)], out[:, :, places : places + text])


def flex_order(blocks: HeadBlocks) -> Tensor:
    """The token at every place of the tiles: image groups, then text, then token 0 to fill the last tile."""
    index = torch.cat([blocks.order.index + blocks.before, blocks.text])
    return F.pad(index, (0, -len(index) % TILE))


def flex_mask(blocks: HeadBlocks, batch: int, heads: int, mask: Tensor | None, device: torch.device) -> flex.BlockMask:
    """FlexAttention's block mask, made from the table and not token by token.

    Tiles of real keys alone are whole; in the others (ragged groups, padded text, the end) every key is asked for.
    """
    per_group, length = blocks.order.length // TILE, len(flex_order(blocks))
    used = len(blocks.order.index) + blocks.before + blocks.after
    real = _allowed(blocks, mask, batch, device)
    real = torch.ones(batch, used, dtype=torch.bool, device=device) if real is None else real
    real = F.pad(real, (0, length - used))  # (B, length)
    tiles = blocks.table.to(device).repeat_interleave(per_group, 2).repeat_interleave(per_group, 3)
    extra = length // TILE - tiles.shape[-1]
    tiles = F.pad(tiles, (0, extra, 0, extra), value=True).expand(batch, heads, -1, -1)
    whole = tiles & real.unflatten(1, (-1, TILE)).all(2)[:, None, None]

    def is_attended(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return tiles[b, h, query // TILE, key // TILE] & real[b, key]

    return flex.BlockMask.from_kv_blocks(
        *_columns_first(tiles & ~whole), *_columns_first(whole), BLOCK_SIZE=TILE, mask_mod=is_attended,
        seq_lengths=(length, length), compute_q_blocks=torch.is_grad_enabled(),
    )  # fmt: skip


def _columns_first(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of tiles a row (B, h, T), and their columns first in each row (B, h, T, T)."""
    width = tiles.shape[-1]
    place = tiles.cumsum(-1, dtype=torch.int32).sub_(1).masked_fill_(~tiles, width).long()
    columns = torch.arange(width, dtype=torch.int32, device=tiles.device).expand_as(tiles)
    packed = torch.zeros(*tiles.shape[:-1], width + 1, dtype=torch.int32, device=tiles.device)
    return tiles.sum(-1, dtype=torch.int32), packed.scatter_(-1, place, columns)[..., :width].contiguous()
