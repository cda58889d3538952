"""Attention over parts of the keys, merged into attention over all of them.

With `out_i` the softmax-weighted mean over part i and `lse_i` the log of the sum of its exponentials,

    out = sum_i exp(lse_i - lse) out_i,   lse = log sum_i exp(lse_i),

which is exact, because a softmax over all keys is the mean of the parts weighted by their mass.

Source: online softmax (arXiv 1805.02867); its use for partial attention as in arXiv 2205.14135, section 3.1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some keys: out (B, h, N, d) and log-sum-exp of the scaled scores (B, h, N), float32."""

    out: Tensor
    lse: Tensor


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over all keys from attention over disjoint parts of them.

    A part with no keys for a query has an lse of -inf there; at least one part has keys.
    """
    lses = torch.stack([part.lse for part in parts])  # (parts, B, h, N)
    total = lses.logsumexp(0)
    weights = (lses - total).exp().nan_to_num(0.0)  # -inf - -inf where no part has keys
    out = sum(weight[..., None] * part.out.float() for weight, part in zip(weights, parts, strict=True))
    assert isinstance(out, Tensor)
    return Partial(out.to(parts[0].out.dtype), total)


def mass(part: Partial, whole: Partial) -> Tensor:
    """Share of the softmax that a part of the keys holds (B, h, N), in [0, 1]."""
    return (part.lse - whole.lse).exp()
