"""Which blocks of an attention are worth computing: scores of pairs of groups, and a table of those that are kept.

A score says how much a group of queries attends to a group of keys. `draft_scores` averages q and k over every group
and takes the softmax of the small attention, P = softmax(q~ k~^T / sqrt(d)), at 1 / g^2 of the cost; `true_scores` sum
the attention itself, what a draft stands for; the others look at no query: by distance, by frame or place, by chance.

`keep_blocks` makes a table: of all G * G blocks of a head the best (one threshold a head: rows differ in number), of
every row equally many, or of every row as many as hold a share of its score. Groups always keep themselves.

Source: DraftAttention (arXiv 2505.14708), section 4 for the draft and one threshold a head; Sparse-VideoGen (arXiv
2502.01776), section 3 for heads that look along frames or along places.
Shapes: B batch, h heads, L tokens, N of the image, G groups, d head_dim.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.ops.token_order import GroupOrder

Rule = Literal["head", "row", "mass"]
Guide = Literal["draft", "oracle", "random", "window", "frame-or-place"]
ROWS = 1024
"""Queries whose scores `true_scores` holds at a time."""


def group_means(x: Tensor, order: GroupOrder) -> Tensor:
    """Mean of the tokens of every group (..., G, d) from image tokens (..., N, d), in the order of the groups.

    Ragged groups are averaged over the tokens they have.
    """
    image = x.unflatten(-2, order.grid)  # (..., F, H, W, d)
    if order.is_padded:
        ends = [count * part - side for side, part, count in zip(order.grid, order.group, order.groups, strict=True)]
        image = F.pad(image, (0, 0, 0, ends[2], 0, ends[1], 0, ends[0]))
    for axis, part in zip((-2, -3, -4), reversed(order.group), strict=True):
        image = image.unflatten(axis, (-1, part)).mean(axis)
    means = image.flatten(-4, -2)  # (..., G, d)
    if not order.is_padded:
        return means
    filled = order.is_real.to(x.device).unflatten(0, (order.count, order.length)).float().mean(1)
    return means / filled[:, None].to(means.dtype)


def guide_scores(
    guide: Guide,
    q: Tensor,
    k: Tensor,
    order: GroupOrder,
    before: int = 0,
    mask: Tensor | None = None,
    scale: float | None = None,
    sparsity: float = 0.75,
    seed: int = 0,
) -> Tensor:
    """Scores of blocks (B, h, G, G) by any guide; B and h may be 1.

    Args:
        guide: the draft, the attention itself (oracle), or what a draft is measured against.
        q, k: all tokens (B, h, L, d).
        order: groups of the image tokens.
        before: text tokens before the image.
        mask: keys that may be attended to (B, 1, 1, L), bool or a bias.
        scale: factor on the scores, None = 1 / sqrt(d).
        sparsity: at which frame-or-place compares its two windows.
        seed: of random.
    """
    if guide == "draft":
        image = slice(before, before + len(order.inverse))
        return draft_scores(q[:, :, image], k[:, :, image], order, scale)
    if guide == "window":
        return distance_scores(order).to(q.device)
    if guide == "random":
        return random_scores(order, q.shape[1], seed).to(q.device)
    true = true_scores(q, k, order, before, mask, scale)
    return true if guide == "oracle" else frame_or_place_scores(true, order, sparsity)


def draft_scores(q: Tensor, k: Tensor, order: GroupOrder, scale: float | None = None) -> Tensor:
    """The draft map (B, h, G, G) of image queries and keys (B, h, N, d), rows summing to 1."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = group_means(q, order) @ group_means(k, order).transpose(-1, -2)
    return (scores.float() * scale).softmax(-1)


def true_scores(
    q: Tensor, k: Tensor, order: GroupOrder, before: int = 0, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention of all tokens summed over image blocks (B, h, G, G); what goes to text is missing from the sum.

    Args:
        q, k: all tokens (B, h, L, d).
        order: groups of the image tokens.
        before: text tokens before the image.
        mask: keys that may be attended to (B, 1, 1, L), bool or a bias.
        scale: factor on the scores, None = 1 / sqrt(d).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    image = slice(before, before + len(order.inverse))
    group = (order.inverse // order.length).to(q.device)  # (N,)
    found = q.new_zeros(*q.shape[:2], order.count, order.count, dtype=torch.float32)
    for queries, groups in zip(q[:, :, image].split(ROWS, dim=2), group.split(ROWS), strict=True):
        scores = (queries.float() * scale) @ k.float().transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        shares = scores.softmax(-1)[..., image]  # (B, h, rows, N)
        columns = shares.new_zeros(*shares.shape[:3], order.count).index_add_(3, group, shares)
        found.index_add_(2, groups, columns)
    return found


def distance_scores(order: GroupOrder, weights: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Minus the squared distance of groups (1, 1, G, G): the best are a static window.

    Args:
        order: the groups.
        weights: of frames, rows and columns.
    """
    axes = [torch.arange(count) for count in order.groups]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).float()  # (G, 3)
    difference = (places[:, None] - places[None]).square() * torch.tensor(weights)
    return -difference.sum(-1)[None, None]


def frame_or_place_scores(true: Tensor, order: GroupOrder, sparsity: float) -> Tensor:
    """For every head the window along its frame or along its place, whichever keeps more of the true scores."""
    windows = [distance_scores(order, weights).to(true.device) for weights in ((1e6, 1.0, 1.0), (1.0, 1e6, 1e6))]
    held = [(true * keep_blocks(one, sparsity, "row")).sum((2, 3), keepdim=True) for one in windows]
    return torch.where(held[0] >= held[1], *windows)


def random_scores(order: GroupOrder, heads: int, seed: int) -> Tensor:
    """Scores by chance (1, h, G, G)."""
    return torch.rand(1, heads, order.count, order.count, generator=torch.Generator().manual_seed(seed))


def kept_share(count: int, sparsity: float, rule: Rule) -> float | None:
    """Share of the blocks of a map of `count` groups that `keep_blocks` keeps; None where it depends on the scores."""
    if rule == "mass":
        return None
    return _number(count, sparsity) / count if rule == "row" else _number(count, sparsity, count) / count**2


def keep_blocks(scores: Tensor, sparsity: float, rule: Rule = "head") -> Tensor:
    """The table of kept blocks (B, h, G, G), bool; every group keeps itself, which counts like any block.

    Args:
        scores: not negative for "mass" (B, h, G, G).
        sparsity: share of blocks (for "mass": of a row's score) that is left out, in [0, 1).
        rule: head (the best of all blocks of a head), row (of each row) or mass (of each row, by its sum).
    """
    count = scores.shape[-1]
    own = torch.eye(count, dtype=torch.bool, device=scores.device)
    first = scores.masked_fill(own, torch.inf)
    if rule == "head":
        flat = first.flatten(2)
        left_out = flat.shape[-1] - _number(count, sparsity, count)
        # The smallest kept score of all heads at once; blocks that equal it are kept, too.
        return first >= flat.kthvalue(left_out + 1, dim=-1).values[..., None, None]
    if rule == "row":
        best = first.topk(_number(count, sparsity), dim=-1).indices
        return torch.zeros_like(first, dtype=torch.bool).scatter_(-1, best, True)
    ranked = first.argsort(-1, descending=True)
    shares = (scores / scores.sum(-1, keepdim=True)).gather(-1, ranked)
    is_needed = shares.cumsum(-1) - shares < 1 - sparsity
    return torch.zeros_like(is_needed).scatter_(-1, ranked, is_needed) | own


def _number(count: int, sparsity: float, rows: int = 1) -> int:
    """Blocks that `rows` rows keep together, at least one each."""
    return max(rows, round((1 - sparsity) * count * rows))
