"""Block-sparse attention: groups of queries that share the groups of keys they attend to.

Image tokens stand in groups (`ops.token_order`); a boolean table (G, G) says which groups a group attends to. Text
tokens stand before or after the image: image queries attend to all of them, and text queries to everything. A mask of
the keys (padding of the text) holds for everybody.

Three ways to compute the same: `gather` repeats the attended keys of every group and runs one dense attention with the
groups as batch (fast on CPU and GPU where all groups attend to equally many, or nearly); `flex` gives FlexAttention a
block mask made from the table, once a shape (GPU, groups of a multiple of 128 tokens); `dense` is plain attention, with
the table as a token mask: the reference. `choose` picks one, and plain attention where sparsity would cost more.

Source: GRAT (arXiv 2505.14687), section 3; FlexAttention (arXiv 2412.05496) for the block mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex

from smalti.ops.attention import attention_with_lse
from smalti.ops.lse_merge import Partial
from smalti.ops.token_order import GroupOrder

Backend = Literal["dense", "gather", "flex", "full"]
TILE = 128


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Where tokens stand and who attends to whom; made once a shape and kept.

    Args:
        order: groups of the image tokens.
        table: which groups a group attends to (G, G), bool; every group attends to itself.
        before: text tokens before the image.
        after: text tokens after it.
    """

    order: GroupOrder
    table: Tensor
    before: int = 0
    after: int = 0
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        count = self.order.count
        if self.table.shape != (count, count) or self.table.dtype != torch.bool:
            raise ValueError(f"a table of {count} groups is bool ({count}, {count}), got {tuple(self.table.shape)}")
        if not self.table.any(1).all():
            raise ValueError("a group that attends to nothing; let every group attend at least to itself")

    @property
    def image(self) -> slice:
        """Where the image tokens stand."""
        return slice(self.before, self.before + len(self.order.inverse))

    @property
    def neighbours(self) -> Tensor:
        """Attended groups of every group (G, n), filled up with -1 to the largest number."""
        if "neighbours" not in self.kept:
            most = int(self.table.sum(1).max())
            ranked = self.table.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            self.kept["neighbours"] = ranked.masked_fill(~self.table.gather(1, ranked), -1)
        return self.kept["neighbours"]

    @property
    def attended(self) -> float:
        """Share of image keys that a mean image query attends to."""
        return float(self.table.float().mean())

    def token_mask(self, device: torch.device) -> Tensor:
        """Which token attends to which (L, L), text included: the reference form."""
        group = torch.empty(len(self.order.inverse), dtype=torch.long)
        group[:] = self.order.inverse // self.order.length
        length = self.before + len(group) + self.after
        mask = torch.ones(length, length, dtype=torch.bool)
        mask[self.image, self.image] = self.table[group][:, group]
        return mask.to(device)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention in which image queries attend to the groups of the table and to all text.

    Args:
        q: queries (B, h, L, d), L = before + N + after.
        k, v: keys and values (B, h, L, d).
        layout: groups and text.
        mask: keys that may be attended to (B, 1, 1, L), bool or an additive bias of that shape; None = all.
        scale: factor on the scores, None = 1 / sqrt(d).
        backend: how; None = `choose`.

    Returns:
        (B, h, L, d)

    Raises:
        ValueError: a mask of another shape (one that differs between queries is the model's own pattern).
    """
    _check_key_mask(mask)
    backend = choose(layout, q.device) if backend is None else backend
    if backend == "full":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if backend == "dense":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_dense_mask(layout, mask, q.device), scale=scale)
    if backend == "flex":
        return _flex(q, k, v, layout, mask, scale)
    groups = _gather(q, k, v, layout, mask)
    out = F.scaled_dot_product_attention(*groups[:3], attn_mask=groups.mask, scale=scale)
    if not layout.before and not layout.after:
        return _scatter(out, None, layout)
    text = F.scaled_dot_product_attention(_text_of(q, layout), k, v, attn_mask=mask, scale=scale)
    return _scatter(out, text, layout)


def block_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Partial:
    """`block_attention` with the log-sum-exp over the keys that each query attends to; arguments as there.

    Returns:
        out (B, h, L, d) and lse (B, h, L), float32.

    Raises:
        ValueError: a mask of another shape.
    """
    _check_key_mask(mask)
    backend = choose(layout, q.device) if backend is None else backend
    if backend == "full":
        return attention_with_lse(q, k, v, mask, scale)
    if backend == "dense":
        return attention_with_lse(q, k, v, _dense_mask(layout, mask, q.device), scale)
    if backend == "flex":
        out, lse = _flex(q, k, v, layout, mask, scale, return_lse=True)
        return Partial(out, lse)
    groups = _gather(q, k, v, layout, mask)
    image = attention_with_lse(*groups, scale=scale)
    if not layout.before and not layout.after:
        return Partial(_scatter(image.out, None, layout), _scatter(image.lse[..., None], None, layout)[..., 0])
    text = attention_with_lse(_text_of(q, layout), k, v, mask, scale)
    lse = _scatter(image.lse[..., None], text.lse[..., None], layout)[..., 0]
    return Partial(_scatter(image.out, text.out, layout), lse)


def _check_key_mask(mask: Tensor | None) -> None:
    if mask is not None and (mask.ndim != 4 or mask.shape[-2] != 1 or mask.shape[-3] != 1):
        raise ValueError(f"a mask of keys is (B, 1, 1, L), got {tuple(mask.shape)}")


def _dense_mask(layout: BlockLayout, mask: Tensor | None, device: torch.device) -> Tensor:
    """The table and a mask of keys as one mask of tokens."""
    allowed = layout.token_mask(device)
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return allowed & mask
    return torch.zeros_like(allowed, dtype=mask.dtype).masked_fill(~allowed, -torch.inf) + mask


def choose(layout: BlockLayout, device: torch.device) -> Backend:
    """The cheapest way: `full` where the sparse ways would compute as much as plain attention.

    FlexAttention runs on a GPU, on groups of whole tiles, and needs no equal counts; on a CPU it is slower than dense.
    """
    if sparse_cost(layout) >= 1:
        return "full"
    is_tiled = layout.order.length % TILE == 0 and not layout.order.is_padded
    return "flex" if device.type == "cuda" and is_tiled else "gather"


def sparse_cost(layout: BlockLayout) -> float:
    """Score products of the gather path over those of plain attention, padding and text rows counted."""
    text, tokens = layout.before + layout.after, len(layout.order.inverse)
    image_keys = layout.neighbours.shape[1] * layout.order.length + text
    sparse = layout.order.count * layout.order.length * image_keys + text * (tokens + text)
    return sparse / (tokens + text) ** 2


class _Groups(NamedTuple):
    """Groups as batch: q (B*G, h, g, d) against the keys of its n groups and the text (B*G, h, n*g + M, d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


def _gather(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, mask: Tensor | None) -> _Groups:
    order, image = layout.order, layout.image
    batch, heads = q.shape[:2]
    neighbours = layout.neighbours.to(q.device)
    present = neighbours >= 0
    safe = neighbours.clamp_min(0)
    count, attended = safe.shape

    def grouped(x: Tensor) -> Tensor:
        return order.gather(x[:, :, image])  # (B, h, G, g, d)

    def keys(x: Tensor) -> Tensor:
        picked = grouped(x)[:, :, safe.flatten()].reshape(batch, heads, count, attended * order.length, -1)
        text = _text_of(x, layout)[:, :, None].expand(-1, -1, count, -1, -1)
        return torch.cat([picked, text], dim=3).transpose(1, 2).flatten(0, 1)

    queries = grouped(q).transpose(1, 2).flatten(0, 1)
    return _Groups(queries, keys(k), keys(v), _gather_mask(layout, mask, safe, present, batch))


def _text_of(x: Tensor, layout: BlockLayout) -> Tensor:
    """Text tokens of (B, h, L, d)."""
    return torch.cat([x[:, :, : layout.image.start], x[:, :, layout.image.stop :]], dim=2)


def _scatter(groups: Tensor, text: Tensor | None, layout: BlockLayout) -> Tensor:
    """Groups (B*G, h, g, d) and text (B, h, M, d) in the order of the sequence (B, h, L, d)."""
    count = layout.order.count
    image = layout.order.scatter(groups.unflatten(0, (len(groups) // count, count)).transpose(1, 2))
    return image if text is None else torch.cat([text[:, :, : layout.before], image, text[:, :, layout.before :]], 2)


def _gather_mask(layout: BlockLayout, mask: Tensor | None, safe: Tensor, present: Tensor, batch: int) -> Tensor | None:
    """Which gathered keys count (B*G, 1, 1, n*g + M): real places of present groups, and what the model masks."""
    order, image, device = layout.order, layout.image, safe.device
    if mask is None and not order.is_padded and bool(layout.table.sum(1).eq(layout.table.sum(1)[0]).all()):
        return None
    count = len(safe)
    real = order.is_real.to(device).unflatten(0, (count, order.length))[safe] & present[..., None]  # (G, n, g)
    real = real.flatten(1)[None].expand(batch, -1, -1)
    text = torch.ones(batch, count, layout.before + layout.after, dtype=torch.bool, device=device)
    if mask is None:
        return torch.cat([real, text], dim=2).flatten(0, 1)[:, None, None]
    keys = mask.expand(batch, -1, -1, -1)[:, 0, 0]  # (B, L)
    picked = order.gather(keys[:, image, None])[..., 0][:, safe].flatten(2)  # (B, G, n*g)
    outside = torch.cat([keys[:, : image.start], keys[:, image.stop :]], dim=1)[:, None].expand(-1, count, -1)
    if mask.dtype == torch.bool:
        return torch.cat([picked & real, outside], dim=2).flatten(0, 1)[:, None, None]
    return torch.cat([picked.masked_fill(~real, -torch.inf), outside], dim=2).flatten(0, 1)[:, None, None]


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex.flex_attention, dynamic=False)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    mask: Tensor | None,
    scale: float | None,
    return_lse: bool = False,
) -> Any:
    """Image tokens in their order, text behind them: only the tiles at the text's border are partly filled."""
    order, image = layout.order, layout.image
    index = order.index.to(q.device)

    def ordered(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, image][:, :, index], x[:, :, : image.start], x[:, :, image.stop :]], dim=2)

    def back(x: Tensor) -> Tensor:
        text, tokens = x[:, :, len(index) :], x[:, :, : len(index)][:, :, order.inverse.to(q.device)]
        return torch.cat([text[:, :, : layout.before], tokens, text[:, :, layout.before :]], dim=2)

    if mask is not None:
        raise ValueError("the flex path takes no mask of keys; cut padded text off, or choose gather")
    blocks = flex_mask(layout, q.device)
    if not return_lse:
        return back(_compiled_flex()(ordered(q), ordered(k), ordered(v), block_mask=blocks, scale=scale))
    out, lse = _compiled_flex()(ordered(q), ordered(k), ordered(v), block_mask=blocks, scale=scale, return_lse=True)
    return back(out), back(lse)


def flex_mask(layout: BlockLayout, device: torch.device) -> flex.BlockMask:
    """FlexAttention's block mask, made from the table of groups and not token by token: tiles of 128.

    Tiles of image groups are full; the last tile of the text is cut at the end of the sequence.
    """
    key = f"flex {device}"
    if key not in layout.kept:
        per_group = layout.order.length // TILE
        tokens, text = len(layout.order.index), layout.before + layout.after
        tiles = layout.table.repeat_interleave(per_group, 0).repeat_interleave(per_group, 1)
        extra = -(-text // TILE)
        tiles = F.pad(tiles, (0, extra, 0, extra), value=True).to(device)  # text attends, and is attended to
        whole = tiles.clone()
        if text % TILE:
            whole[:, -1] = False

        def is_attended(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return tiles[query // TILE, key // TILE] & (key < tokens + text)

        part_count, part_index = _ranked(tiles & ~whole)
        whole_count, whole_index = _ranked(whole)
        layout.kept[key] = flex.BlockMask.from_kv_blocks(
            part_count, part_index, whole_count, whole_index, BLOCK_SIZE=TILE, mask_mod=is_attended,
            seq_lengths=(tokens + text, tokens + text),
        )  # fmt: skip
    return layout.kept[key]


def _ranked(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of tiles a row (1, 1, rows), and their columns first in each row (1, 1, rows, columns)."""
    columns = tiles.int().argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]
