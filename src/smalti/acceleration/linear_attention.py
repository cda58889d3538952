"""Linear attention in place of softmax attention, as it is: a comparator for what keeps the softmax and thins it out.

Source: Transformers are RNNs (arXiv 2006.16236), equations 4 to 7; without the training that it needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.method import CoreCall, CoreMethod
from smalti.core.protocols import TokenLayout
from smalti.ops.linear_attention import linear_attention
from smalti.seams.image_attention import check_image_grid, image_grid, keys_alone


@dataclass(frozen=True)
class LinearAttention(CoreMethod):
    """elu(x) + 1 as features of queries and keys, wherever image tokens attend to themselves.

    Args:
        every: one attention in so many, from the first block on; 0 = none.

    Raises:
        UserError: a number below 0.
    """

    every: int = 1

    owns = frozenset({"attention pattern"})
    supports_grad = True  # it declares no less work: with fewer tokens than channels of a head it saves nothing

    def __post_init__(self):
        if self.every < 0:
            raise UserError(f"got every={self.every}; give a whole number from 0")

    @classmethod
    def neutral(cls) -> Self:
        return cls(every=0)

    @classmethod
    def active(cls) -> Self:
        return cls()

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (cls(every=2),)

    @property
    def is_neutral(self) -> bool:
        return self.every == 0

    def check_cores(self, model: str, cores: Mapping[str, tuple[TokenLayout, TokenLayout]]) -> None:
        check_image_grid(model, cores, "LinearAttention")

    def at_core(self, state: None, call: CoreCall) -> Tensor:
        is_chosen = not self.is_neutral and call.site.depth % self.every == 0
        if not is_chosen or image_grid(call.layout, call.key_layout) is None:
            return call.attend(call.q, call.k, call.v, call.mask)
        call.note("linear")
        return linear_attention(call.q, call.k, call.v, keys_alone(call.mask, str(call.site)))
