"""Block-sparse attention beside plain attention on random numbers: how far apart, and how many seconds.

Shapes: B = 1, h heads, L tokens, d head_dim.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from smalti.core.seeds import generators_for, randn
from smalti.evaluation.timing import Ratio, paired_ratio
from smalti.ops.block_mask import Backend, BlockLayout, block_attention


def largest_error(layout: BlockLayout, heads: int = 6, head_dim: int = 32, backend: Backend = "gather") -> float:
    """Largest difference to plain attention, which a layout of all groups must equal."""
    q, k, v = _qkv(layout, heads, head_dim, torch.device("cpu"))
    out = block_attention(q, k, v, layout, backend=backend)
    return (out - scaled_dot_product_attention(q, k, v)).abs().max().item()


def sparse_ratio(layout: BlockLayout, device: torch.device, heads: int = 6, head_dim: int = 32) -> Ratio:
    """Seconds of plain attention over those of the sparse one; bfloat16 on a GPU."""
    q, k, v = _qkv(layout, heads, head_dim, device)
    return paired_ratio(
        lambda: scaled_dot_product_attention(q, k, v), lambda: block_attention(q, k, v, layout), repeats=10, warmup=3
    )


def _qkv(layout: BlockLayout, heads: int, head_dim: int, device: torch.device) -> list[Tensor]:
    """q, k and v (1, h, L, d)."""
    shape = (1, heads, layout.before + len(layout.order.inverse) + layout.after, head_dim)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [randn(shape, generators_for([seed]), device).to(dtype) for seed in range(3)]
