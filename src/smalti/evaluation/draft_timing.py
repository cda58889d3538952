"""Seconds of attention guided by its draft, on random numbers, beside plain attention, and what the guiding costs.

Shapes: B = 1, h heads, N tokens of an image or a video without text, d head_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from smalti.core.seeds import generators_for, randn
from smalti.evaluation.timing import Ratio, median_seconds, paired_ratio
from smalti.ops.block_scores import draft_scores, keep_blocks
from smalti.ops.head_blocks import (
    HeadBlocks,
    choose,
    compiled_flex,
    flex_mask,
    flex_order,
    head_block_attention,
    head_blocks,
)
from smalti.ops.token_order import GroupOrder


@dataclass(frozen=True)
class DraftTimes:
    """How long attention takes.

    Args:
        ratio: plain attention over draft, table, order and sparse attention together.
        overhead: share of the latter that is no attention: draft, table and block mask, and order with `flex`.
        backend: of the sparse attention.
    """

    ratio: Ratio
    overhead: float
    backend: str


@torch.no_grad()
def draft_times(
    order: GroupOrder, sparsity: float, device: torch.device, heads: int = 6, head_dim: int = 32, repeats: int = 10
) -> DraftTimes:
    """Times both ways in turn; bfloat16 on a GPU."""
    shape, dtype = (1, heads, len(order.inverse), head_dim), torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v = (randn(shape, generators_for([seed]), device).to(dtype) for seed in range(3))
    backend = choose(order, 1 - sparsity, 0, device)

    def chosen() -> HeadBlocks:
        return head_blocks(order, keep_blocks(draft_scores(q, k, order), sparsity))

    def sparse() -> Tensor:
        return head_block_attention(q, k, v, chosen(), backend=backend)

    ratio = paired_ratio(lambda: scaled_dot_product_attention(q, k, v), sparse, repeats, warmup=2)
    blocks = chosen()
    if backend == "flex":
        made, ordered = flex_mask(blocks, 1, heads, None, device), [x[:, :, flex_order(blocks)] for x in (q, k, v)]
        alone = median_seconds(lambda: compiled_flex()(*ordered, block_mask=made), repeats)
    else:
        alone = median_seconds(lambda: head_block_attention(q, k, v, blocks, backend=backend), repeats)
    return DraftTimes(ratio, 1 - alone / ratio.second, backend)


def whole_gain(order: GroupOrder, width: int, ratio: float, dense: float = 0.25) -> float:
    """How much faster a whole model of this width runs, by FLOPs, if attention does so at all but the dense steps.

    A block costs 24 * width^2 in products and 4 * N * width in attention for each token.
    """
    share = len(order.inverse) / (len(order.inverse) + 6 * width)
    return 1 / (dense + (1 - dense) * (1 - share + share / ratio))


def crossover(times: dict[int, DraftTimes]) -> str:
    """The largest of these lengths at which it may not be faster."""
    slower = [length for length, found in times.items() if found.ratio.reaches_one]
    return f"{max(slower):,} tokens" if slower else f"faster from {min(times):,} tokens on"


def largest_error(order: GroupOrder, sparsity: float, device: torch.device) -> float:
    """Largest difference of the chosen way to the token mask, 2 heads of 64 in float32, on one table."""
    q, k, v = (randn((1, 2, len(order.inverse), 64), generators_for([seed]), device) for seed in range(3))
    blocks = head_blocks(order, keep_blocks(draft_scores(q, k, order), sparsity))
    found, expected = (head_block_attention(q, k, v, blocks, backend=name) for name in (None, "dense"))
    return float((found - expected).abs().max())
