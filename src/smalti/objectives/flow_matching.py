"""Flow matching on the straight path between data and noise.

With `xt = (1 - t) * x0 + t * noise` the network learns the mean velocity `E[noise - x0 | xt]` by regression:
`loss = E w(t) * |v(xt, t) - (noise - x0)|^2`. The same error may be measured on the estimate of x0 (which multiplies
it by t^2) or of the noise (by (1 - t)^2); the denoiser returns the velocity in every case.

A floor e > 0 keeps some noise at the data's end, `xt = (1 - t) * x0 + (e + (1 - e) * t) * noise` with the velocity
`(1 - e) * noise - x0`: the same straight path, from noise to `x0 + e * noise`.

Source: arXiv 2210.02747, eq. 23 with the linear path; rectified flow, arXiv 2209.03003, eq. 1; the floor, as in the
code of LFM (arXiv 2307.08698). Noise and time come from one generator a sample, so that a loss does not depend on how
its batch is split.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import Batch, Denoiser, Generators, LossResult, TrainState
from smalti.core.seeds import randn
from smalti.core.time import denoised_from_velocity, interpolate, noise_from_velocity
from smalti.objectives.time_sampling import LogitNormal, Shifted, TimeDistribution, check_shift, sample_times

TARGETS = ("velocity", "x0", "eps")


@dataclass(frozen=True)
class FlowMatching:
    """The flow-matching objective.

    Args:
        time: distribution of the training times.
        shift: moves the times towards noise (above 1) or data (below 1); use the same value when sampling.
        target: on which quantity the squared error is measured.
        weight: w(t), a function from times (B,) to weights (B,); none weighs all alike.
        strata: number of strata of the times over consecutive sample ids; the global batch size lowers the variance.
        floor: e, the share of noise that is left at t = 0, in [0, 1); LFM takes 1e-5.

    Example:
        >>> objective = FlowMatching(LogitNormal(0, 1), shift=1.5)
        >>> loss = objective.loss(model, batch, TrainState(), generators_for(range(len(batch.ids)))).loss
    """

    time: TimeDistribution = field(default_factory=LogitNormal)
    shift: float = 1.0
    target: Literal["velocity", "x0", "eps"] = "velocity"
    weight: Callable[[Tensor], Tensor] | None = None
    strata: int = 1
    floor: float = 0.0

    def __post_init__(self):
        check_shift(self.shift)
        if self.target not in TARGETS:
            raise unknown_name("target", self.target, TARGETS)
        if self.strata < 1:
            raise UserError(f"strata {self.strata} is out of range; choose 1 (independent times) or the batch size")
        if not 0 <= self.floor < 1:
            raise UserError(f"a floor of {self.floor} is out of range; choose one from 0, below 1, such as 1e-5")

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """The weighted mean over the batch of the per-sample errors.

        Args:
            denoiser: called once as `denoiser(xt, t, cond)`, returns the velocity (B, ...).
            batch: x0 (B, ...) with conditions and ids.
            state: not used.
            generator: gives each sample its time, then its noise.
        """
        error, t = self.errors(denoiser, batch, generator)
        if self.weight is not None:
            error = error * self.weight(t)
        return LossResult(error.mean())

    def errors(self, denoiser: Denoiser, batch: Batch, generator: Generators) -> tuple[Tensor, Tensor]:
        """Unweighted mean squared error of each sample (B,) in float32, and the times (B,) it was measured at."""
        x0 = batch.x0.float()
        t = sample_times(Shifted(self.time, self.shift), generator, batch.ids, self.strata).to(x0.device)
        noise = randn(x0.shape, generator, x0.device)
        x0 = x0 + self.floor * noise
        xt = interpolate(x0, noise, t)
        velocity = denoiser(xt.to(batch.x0.dtype), t, batch.cond).float()
        match self.target:
            case "velocity":
                error = velocity - (noise - x0)
            case "x0":
                error = denoised_from_velocity(xt, velocity, t) - x0
            case "eps":
                error = noise_from_velocity(xt, velocity, t) - noise
        return error.square().flatten(1).mean(1), t
