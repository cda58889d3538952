"""What a block method would have answered, beside the truth: every block runs, and the method is only asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from torch import Tensor

from smalti.core.method import BlockCall, BlockMethod


@dataclass(frozen=True)
class Foregone(BlockMethod):
    """Asks a method at every block, and goes on with what the block itself gives.

    Args:
        method: is asked; where it lets the block run it sees the block's own output.
        errors: mean |answer - truth| / mean |truth| of the last block's image tokens, by branch and evaluation; filled
            here, in one run.
    """

    method: BlockMethod
    errors: dict[tuple[str, int], float] = field(default_factory=dict, compare=False)

    @classmethod
    def neutral(cls) -> Self:
        raise NotImplementedError("it measures, and changes nothing at any setting")

    active = neutral

    @property
    def is_neutral(self) -> bool:
        return True

    def init(self) -> Any:
        return self.method.init()

    def at_block(self, state: Any, call: BlockCall) -> Mapping[str, Tensor]:
        truth = call.run(call.streams)
        answer = self.method.at_block(state, replace(call, run=lambda streams: truth))
        kind = next((kind for kind in ("image", "joint") if kind in truth), None)
        if kind is not None:
            error = (answer[kind] - truth[kind]).abs().mean() / truth[kind].abs().mean()
            self.errors[call.moment.branch, call.moment.evaluation] = error.item()
        return truth


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's correlation in [-1, 1] of two lists of distinct numbers."""
    first, second = (np.argsort(np.argsort(values)).astype(np.float64) for values in (one, other))
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))
