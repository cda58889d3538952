"""Seconds of attention within a circle on random numbers, beside plain attention, and what a whole model gains.

Shapes: B = 1, h heads, L tokens, d head_dim.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from smalti.core.seeds import generators_for, randn
from smalti.evaluation.timing import Ratio, paired_ratio
from smalti.ops.circle_mask import CircleLayout, circle_attention


@torch.no_grad()
def circle_ratio(
    layout: CircleLayout, device: torch.device, heads: int = 6, head_dim: int = 32, repeats: int = 10
) -> Ratio:
    """Seconds of plain attention over those of the circle, in turn; bfloat16 on a GPU."""
    q, k, v = random_qkv(layout, device, heads, head_dim)
    return paired_ratio(
        lambda: scaled_dot_product_attention(q, k, v), lambda: circle_attention(q, k, v, layout), repeats, warmup=2
    )


@torch.no_grad()
def largest_error(layout: CircleLayout, device: torch.device, heads: int = 2, head_dim: int = 64) -> float:
    """Largest difference of the way that is chosen to plain attention under the token mask, in float32."""
    q, k, v = (one.float() for one in random_qkv(layout, device, heads, head_dim))
    apart = circle_attention(q, k, v, layout) - circle_attention(q, k, v, layout, backend="dense")
    return apart.abs().max().item()


def random_qkv(layout: CircleLayout, device: torch.device, heads: int, head_dim: int) -> list[Tensor]:
    """q, k and v (1, h, L, d)."""
    blocks = layout.blocks
    shape = (1, heads, blocks.before + len(blocks.order.inverse) + blocks.after, head_dim)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [randn(shape, generators_for([seed]), device).to(dtype) for seed in range(3)]


def whole_gain(layout: CircleLayout, width: int, ratio: float) -> float:
    """How much faster a model of this width runs, by FLOPs, if its attention does so by `ratio`.

    A block costs 24 * width^2 in products and 4 * L * width in attention for each token.
    """
    length = layout.blocks.before + len(layout.blocks.order.inverse) + layout.blocks.after
    products, attention = 24 * width**2, 4 * length * width
    return (products + attention) / (products + attention / ratio)
