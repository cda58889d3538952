"""Flow matching that also asks for the direction of the velocity.

    loss = flow matching + weight * mean over places of (1 - cos(predicted, noise - x0)),

with the cosine along the channels of each place. Where the velocity is large, a squared error hardly sees its
direction; the cosine sees nothing else.

Source: LightningDiT (Reconstruction vs. Generation, arXiv 2501.01423), section 4.1; the direction loss of FasterDiT
(arXiv 2410.10356), equation 11.
"""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, Denoiser, Generators, LossResult, TrainState
from smalti.core.time import expand_time
from smalti.objectives.flow_matching import FlowMatching

SMALLEST_TIME = 1e-3
"""Below it the velocity cannot be told from noisy and clean sample in float32, and the term is left out."""


@dataclass(frozen=True)
class CosineFlowMatching:
    """The objective.

    Args:
        flow: path, times and weights of the squared error.
        weight: of the cosine term.

    Example:
        >>> objective = CosineFlowMatching(FlowMatching(LogitNormal(0, 1)), weight=1.0)
    """

    flow: FlowMatching = field(default_factory=FlowMatching)
    weight: float = 1.0

    def __post_init__(self):
        if self.weight < 0:
            raise UserError(f"got a weight of {self.weight}; it must be at least 0")

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """The sum of both; the metrics tell them apart."""
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def watched(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            velocity = denoiser(x, t, cond)
            seen.append((x, t, velocity))
            return velocity

        squared = self.flow.loss(watched, batch, state, generator)
        xt, t, velocity = seen[-1]
        clean = (t > SMALLEST_TIME).float()
        # On the straight path (xt - x0) / t is the velocity's direction exactly, and a cosine needs no more.
        target = (xt.float() - batch.x0.float()) / expand_time(t.clamp_min(SMALLEST_TIME), xt)
        term = (direction_error(velocity, target) * clean).sum() / clean.sum().clamp_min(1)
        metrics = {"flow matching": squared.loss.detach(), "direction": term.detach()}
        return LossResult(squared.loss + self.weight * term, {**squared.metrics, **metrics})


def direction_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean over places of 1 - cosine along the channels, (B,) in [0, 2], of two velocities (B, C, ...)."""
    return (1 - F.cosine_similarity(velocity.float(), target.float(), dim=1)).flatten(1).mean(1)
