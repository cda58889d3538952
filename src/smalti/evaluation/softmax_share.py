"""Errors of the fused softmax statistics on random numbers, against all scores written out.

Shapes: B = 1, h heads, L tokens, d head_dim.
"""

from typing import NamedTuple

from smalti.core.seeds import generators_for, randn
from smalti.ops.attention import attention, attention_with_lse
from smalti.ops.block_mask import BlockLayout, block_attention_with_lse
from smalti.ops.lse_merge import mass


class ShareErrors(NamedTuple):
    """Largest differences: of the output beside the log-sum-exp to plain attention, and of the share of a mask."""

    output: float
    share: float


def share_errors(layout: BlockLayout, heads: int = 6, head_dim: int = 32) -> ShareErrors:
    """How far the share of the softmax that a layout holds is from row sums of the dense softmax over its mask."""
    shape = (1, heads, layout.before + len(layout.order.inverse) + layout.after, head_dim)
    q, k, v = (randn(shape, generators_for([seed])) for seed in range(3))
    whole, part = attention_with_lse(q, k, v), block_attention_with_lse(q, k, v, layout, backend="gather")
    weights = (q @ k.transpose(-1, -2) * head_dim**-0.5).softmax(-1)  # (1, h, L, L)
    sums = (weights * layout.token_mask(q.device)).sum(-1)
    return ShareErrors(
        (whole.out - attention(q, k, v)).abs().max().item(), (mass(part, whole) - sums).abs().max().item()
    )
