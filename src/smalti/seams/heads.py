"""Addresses of attention heads: (layer, head), written L1H10; L1 alone is every head of the layer.

A layer is a block, counted over all stacks in the order in which they run (`Site.depth`); its heads are those of the
attention of its own tokens to themselves, cross-attention to a text not counted. How many there are is seen when the
model runs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from smalti.core.errors import Refusal, UserError
from smalti.core.method import CoreCall, CoreMethod
from smalti.core.protocols import TokenLayout
from smalti.seams.apply import apply

Address = tuple[int, int | None]
"""(layer, head), both from 0; None = every head of the layer."""
WRITTEN = re.compile(r"L(\d+)(?:H(\d+))?")


def read_address(text: str) -> Address:
    """The address of L1H10 or L1.

    Raises:
        UserError: it is written in another way.
    """
    found = WRITTEN.fullmatch(text)
    if found is None:
        raise UserError(f"got {text!r} for an attention head; write L1H10, or L1 for every head of a layer")
    return int(found[1]), None if found[2] is None else int(found[2])


def write_address(address: Address) -> str:
    """L1H10 or L1."""
    layer, head = address
    return f"L{layer}" if head is None else f"L{layer}H{head}"


def is_self_attention(queries: TokenLayout, keys: TokenLayout) -> bool:
    """Whether a sequence with image tokens attends to itself."""
    return queries.segments == keys.segments and any(one.kind == "image" for one in queries.segments)


def strengths(heads: Mapping[Address, float], layer: int, count: int) -> Tensor | None:
    """A number for every head of a layer (h,), 0 where none was given; None if the layer has none at all.

    Raises:
        Refusal: the layer has fewer heads.
    """
    given = {head: value for (one, head), value in heads.items() if one == layer}
    if not any(given.values()):
        return None
    most = max((head for head in given if head is not None), default=0)
    if most >= count:
        raise Refusal(f"there is no L{layer}H{most}: layer {layer} has {count} heads, H0 to H{count - 1}")
    result = torch.full((count,), float(given.get(None, 0.0)))
    for head, value in given.items():
        if head is not None:
            result[head] = value
    return result


@dataclass(frozen=True)
class _Counting(CoreMethod):
    """Sees how many heads every layer has."""

    found: dict[int, int] = field(default_factory=dict)

    @classmethod
    def neutral(cls) -> Self:
        return cls()

    @classmethod
    def active(cls) -> Self:
        return cls()

    @property
    def is_neutral(self) -> bool:
        return True

    def at_core(self, state: None, call: CoreCall) -> Tensor:
        if is_self_attention(call.layout, call.key_layout):
            self.found[call.site.depth] = call.q.shape[1]
        return call.attend(call.q, call.k, call.v, call.mask)


def read_heads(target: Any, run: Callable[[], Any]) -> tuple[Address, ...]:
    """All heads of a pipeline or model, in order.

    Args:
        target: what `smalti.apply` takes.
        run: calls it, once is enough: `lambda: pipe("a fox", num_inference_steps=1)`.

    Raises:
        Refusal: no layer attends to itself by the attention that methods can act on.
    """
    counting = _Counting()
    with apply(target, counting):
        run()
    if not counting.found:
        raise Refusal("no layer has softmax attention of image tokens to their own sequence, so there are no heads")
    return tuple((layer, head) for layer, count in sorted(counting.found.items()) for head in range(count))
