"""Damaged attention of chosen heads: what they would give without their attention map, or with a part of it.

Attention gives `O = A V` with the map `A = softmax(q k^T * scale + mask)`. A damaged map A' takes its place in the rows
of the target tokens, softened by a strength u of each head:

    O_soft = (1 - u) A V + u A' V

which needs no map at all: every A' V is V itself, or one more fused attention. Two other paths from A to A' mix the
maps themselves (log-linear; and slerp, the shortest way of Fisher and Rao, along the great circle of square roots), so
these write them out: L^2 numbers a head, for small shapes.

Kinds of damage: `identity` (A' = I: each token keeps its own value), `uniform` (all keys alike), `mean query` (all
target tokens ask with their mean query), `temperature:T` (scores over T), `zero` (target tokens take nothing from one
another; what they take from other tokens stays as it is).

Source: PAG (arXiv 2403.17377) for identity; SEG (arXiv 2408.00760) for the mean query; SoftPAG (arXiv 2506.10978).
Letters: B batch, h heads, L tokens, d head_dim.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from smalti.core.errors import Refusal, UserError, unknown_name

Blend = Literal["linear", "log-linear", "slerp"]
KINDS = ("identity", "uniform", "mean query", "temperature:T", "zero")
BLENDS = ("linear", "log-linear", "slerp")
MOST_BYTES = 2**31
FLOOR = 1e-8
"""Smallest probability on the log-linear path: the logarithm of an identity map needs one."""


def check_kind(kind: str) -> None:
    """Raises `UserError` if there is no such damage."""
    name, _, number = kind.partition(":")
    try:
        is_known = kind in KINDS[:3] or kind == "zero" or (name == "temperature" and float(number) > 0)
    except ValueError:
        is_known = False
    if not is_known:
        raise unknown_name("kind of damage", kind, KINDS)


def soften(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    strength: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    kind: str = "identity",
    target: Tensor | None = None,
) -> Tensor:
    """The linear path, through fused attention alone.

    Args:
        q, k, v: of the attention of a sequence to itself (B, h, L, d).
        mask: as the model gave it.
        strength: u of every head, (h, 1, 1) or (B, h, 1, 1), within [0, 1].
        attend: `(q, k, v, mask) -> (B, h, L, d)`.
        kind: of the damage.
        target: which tokens are damaged (L, 1), bool; None = all.

    Returns:
        (B, h, L, d); heads of strength 0 as they are, bit for bit.
    """
    plain = attend(q, k, v, mask)
    if kind == "identity":
        damaged = v
    elif kind == "zero":
        damaged = torch.zeros_like(v) if target is None else attend(q, k, v.masked_fill(target, 0), mask)
    else:
        damaged = attend(_damaged_queries(q, kind, target), k, v, mask)
    strength = strength.to(plain.dtype)
    return torch.lerp(plain, damaged, strength if target is None else strength * target)


def soften_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    strength: Tensor,
    scale: float | None = None,
    kind: str = "identity",
    target: Tensor | None = None,
    blend: Blend = "linear",
) -> Tensor:
    """As `soften` with the maps written out: the other paths, and the reference of the linear one.

    Raises:
        Refusal: the maps would take more than 2 GiB.
        UserError: `zero` on another path than the linear one, whose rows are no probabilities.
    """
    if kind == "zero" and blend != "linear":
        raise UserError(
            f"a zeroed map holds no probabilities, so it has no {blend} blend; choose linear, or another kind"
        )
    size = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if size > MOST_BYTES:
        raise Refusal(
            f"the {blend} blend writes attention maps out: {size / 2**30:.1f} GiB here; choose blend='linear'"
        )
    plain = _attention_map(q, k, mask, scale)
    if kind == "identity":
        damaged = torch.eye(q.shape[2], device=q.device).expand_as(plain)
    elif kind == "zero":
        damaged = plain * 0 if target is None else plain.masked_fill(target.mT, 0)
    else:
        damaged = _attention_map(_damaged_queries(q, kind, target), k, mask, scale)
    u = strength.float() if target is None else strength.float() * target
    return (_between(plain, damaged, u, blend) @ v.float()).to(v.dtype)


def _damaged_queries(q: Tensor, kind: str, target: Tensor | None) -> Tensor:
    name, _, number = kind.partition(":")
    if name == "uniform":
        changed = torch.zeros_like(q)
    elif name == "mean query":
        picked = q if target is None else q[:, :, target[:, 0]]
        changed = picked.mean(2, keepdim=True).expand_as(q).contiguous()
    else:
        changed = q / float(number)
    return changed if target is None else torch.where(target, changed, q)


def _attention_map(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """(B, h, L, L), float32."""
    scores = (q.float() * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.float().mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1)


def _between(one: Tensor, other: Tensor, u: Tensor, blend: Blend) -> Tensor:
    """The map at u on the way from one (u = 0) to the other."""
    if blend == "linear":
        return torch.lerp(one, other, u.expand_as(one))
    if blend == "log-linear":
        return torch.lerp(one.clamp_min(FLOOR).log(), other.clamp_min(FLOOR).log(), u.expand_as(one)).softmax(-1)
    angle = (one.sqrt() * other.sqrt()).sum(-1, keepdim=True).clamp(0, 1 - 1e-7).acos()
    root = (((1 - u) * angle).sin() * one.sqrt() + (u * angle).sin() * other.sqrt()) / angle.sin()
    return root.square()
