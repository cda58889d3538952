"""A sharper softmax for longer sequences: scores are scaled by sqrt(log_n(N) / d) instead of sqrt(1 / d).

With more keys than in training (N > n) the softmax is spread over more of them; this keeps its entropy about the same.

Source: Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis (arXiv 2306.08645), section
3.3; its use at high resolution as in CLEAR (arXiv 2412.16112). N counts all keys, text too.
"""

import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.method import CoreCall, CoreMethod


@dataclass(frozen=True)
class ProportionalAttention(CoreMethod):
    """Scales scores by the length of the sequence.

    Args:
        trained: tokens of the sequences that the model was trained on, text included; 0 = leave scores alone.

    Raises:
        UserError: a length of 1, or below 0.
    """

    trained: int = 0

    order = -1  # before methods that replace the attention
    supports_grad = True

    def __post_init__(self):
        if self.trained < 0 or self.trained == 1:
            raise UserError(f"got trained={self.trained}; give the tokens of a sequence in training, or 0")

    @classmethod
    def neutral(cls) -> Self:
        return cls()

    @classmethod
    def active(cls) -> Self:
        return cls(trained=2)

    @property
    def is_neutral(self) -> bool:
        return self.trained == 0

    def at_core(self, state: None, call: CoreCall) -> Tensor:
        length = call.k.shape[2]
        if self.is_neutral or length == self.trained or call.layout.segments != call.key_layout.segments:
            return call.attend(call.q, call.k, call.v, call.mask)
        call.note("scaled")
        factor = math.sqrt(math.log(length) / math.log(self.trained))
        return call.attend(call.q * factor, call.k, call.v, call.mask)
