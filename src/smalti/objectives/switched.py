"""One objective up to a step of the training, another from there on: a finish on all tokens, or at other times.

The switch is hard, and a pure function of the step, so that a resumed training makes it at the same place.
"""

from dataclasses import dataclass

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Denoiser, Generators, LossResult, Objective, TrainState


@dataclass(frozen=True)
class Switched:
    """The first objective at steps below `at`, the second from there on.

    Args:
        first, second: objectives.
        at: step from which the second counts, from 0.

    Example:
        >>> Switched(MaskedFlowMatching(RandomMask(0.75)), FlowMatching(), at=900)
    """

    first: Objective
    second: Objective
    at: int

    def __post_init__(self):
        if self.at < 0:
            raise UserError(f"objectives switch at step {self.at}; choose one from 0")

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """The loss of the one that counts at `state.step`."""
        return (self.first if state.step < self.at else self.second).loss(denoiser, batch, state, generator)
