"""FLOPs of whatever runs: matrix products and attention, on the CPU too.

The stock counter sees no attention on the CPU; here its formula is registered for those kernels: for q (B, h, N, d),
k (B, h, M, d) and v (B, h, M, e) it is 2 B h N M (d + e), a mask or not. One multiply-add is two FLOPs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Flops:
    """Counted FLOPs: of matrix products (and convolutions), and of attention."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.products + self.attention


def attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of one attention from the shapes (B, h, N, d), (B, h, M, d), (B, h, M, e)."""
    batch, heads, queries, width = q
    keys, width_v = k[-2], v[-1]
    return 2 * batch * heads * queries * keys * (width + width_v)


def attention_backward_flops(
    grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Five products of which the forward has two: scores again, and the gradients of scores, values, queries, keys."""
    batch, heads, queries, width = q
    keys, width_v = k[-2], v[-1]
    return 2 * batch * heads * queries * keys * (3 * width + 2 * width_v)


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_flops(function: Callable[[], Any]) -> Flops:
    """Counts what a call does, its backward passes too.

    Args:
        function: run once, in the caller's grad mode.
    """
    with _Counter(display=False, custom_mapping=FORMULAS) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for kernel, count in counts.items() if "attention" in str(kernel))
    return Flops(float(sum(counts.values()) - attention), float(attention))


class _Counter(FlopCounterMode):
    """Without the tracker of modules, which fails on a module that returns a weight under `no_grad`."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.mod_tracker = _NoTracker()  # type: ignore[assignment]


class _NoTracker:
    parents = frozenset({"Global"})

    def __enter__(self) -> "_NoTracker":
        return self

    def __exit__(self, *error: Any) -> None:
        return None
