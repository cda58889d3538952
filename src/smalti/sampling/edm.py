"""EDM's sampler: noise levels that thin out towards data, and Heun's method on the unscaled sample.

    sigma_i = (max^(1/rho) + i / (n - 1) * (min^(1/rho) - max^(1/rho)))^rho,  then 0
    dz/dsigma = (z - D) / sigma

In our time, `t = sigma / (1 + sigma)` and `x = (1 - t) z`, that slope is the estimate of the noise. Steps straight in
(z, sigma) are other ones than steps straight in (x, t): with few of them the two samplers differ.

Source: EDM (arXiv 2206.00364), algorithm 1 and equation 5, without its added noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Cond, Denoiser, SolverState
from smalti.sampling.guidance import BoundDenoiser, Guidance
from smalti.sampling.loop import sample


def edm_schedule(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """Times of the noise levels, `steps` + 1 of them, the last 0.

    Raises:
        UserError: fewer than 2 steps, or levels that do not fall.
    """
    if steps < 2 or not 0 < sigma_min < sigma_max or rho <= 0:
        raise UserError(
            f"got {steps} steps from sigma {sigma_max} to {sigma_min} with rho {rho}; give at least 2, a minimum "
            "above 0 and below the maximum, and rho above 0"
        )
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = [(first + index / (steps - 1) * (last - first)) ** rho for index in range(steps)]
    return [sigma / (1 + sigma) for sigma in levels] + [0.0]


@dataclass(frozen=True)
class SigmaHeun:
    """Heun's method in the noise level: two calls a step, one where it ends at data."""

    order: ClassVar[int] = 2

    @property
    def needs_noise(self) -> bool:
        """Never: the path is deterministic."""
        return False

    def step(
        self, state: SolverState, denoiser: BoundDenoiser, t: float, s: float, noise: Tensor | None = None
    ) -> SolverState:
        """The state at time s from the state at time t, both below 1, where the noise level has no end."""
        if max(t, s) >= 1:
            raise UserError("EDM's noise level has no end at t = 1; begin at a time of `edm_schedule`")
        span = s / (1 - s) - t / (1 - t)
        z, slope = state.x / (1 - t), _slope(denoiser, state.x, t)
        x = (z + span * slope) * (1 - s)
        if s == 0:
            return SolverState(x)
        return SolverState((z + span * (slope + _slope(denoiser, x, s)) / 2) * (1 - s))


def sample_edm(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Cond | None = None,
    uncond: Cond | None = None,
    guidance: float = 1.0,
    schedule: Sequence[float] | None = None,
    steps: int = 30,
    progress: bool | None = True,
) -> Tensor:
    """Draws samples.

    Args:
        denoiser: `(x, t, cond) -> velocity`, preconditioned or not.
        noise: standard normal (B, ...).
        cond: conditioning of the B samples.
        uncond: of the unconditional branch, needed if guidance is not 1.
        guidance: scale of classifier-free guidance.
        schedule: of times; None = `edm_schedule(steps)`.
        steps: of the default schedule.
        progress: whether a bar may be shown.
    """
    schedule = edm_schedule(steps) if schedule is None else schedule
    start = noise * schedule[0]  # the largest level times noise, in the scale of x; of the data nothing is left
    return sample(
        denoiser, start, schedule, SigmaHeun(), cond=cond, uncond=uncond, guidance=Guidance(guidance), progress=progress
    ).x


def _slope(denoiser: BoundDenoiser, x: Tensor, t: float) -> Tensor:
    return x + (1 - t) * denoiser(x, t).to(x.dtype)
