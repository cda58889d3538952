"""DDIM: few backward steps of a diffusion model, with as much fresh noise as wanted.

With the estimates x0 and eps of a denoiser at time t, and `alpha, sigma` of unit length (see `beta_process`),

    z_s = alpha_s x0 + sqrt(sigma_s^2 - d^2) eps + d noise
    d = eta (sigma_s / sigma_t) sqrt(1 - (alpha_t / alpha_s)^2)

On our straight path, where `x = (1 - t) x0 + t eps`, the step without noise (eta = 0) is Euler's.

Source: DDIM (arXiv 2010.02502), equations 12 and 16; timesteps counted from the noisy end, arXiv 2305.08891, table 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Cond, Denoiser, Generators, SolverState
from smalti.objectives.beta_process import BetaProcess
from smalti.sampling.guidance import BoundDenoiser, Guidance
from smalti.sampling.loop import sample


def ddim_schedule(process: BetaProcess, steps: int) -> list[float]:
    """Our times of evenly spaced timesteps, the first the noisiest; `steps` + 1 of them, the last 0.

    Raises:
        UserError: more steps than timesteps, or none.
    """
    if not 1 <= steps <= process.count:
        raise UserError(f"got {steps} steps; choose from 1 to the {process.count} timesteps of the process")
    indices = [round(process.count * (1 - step / steps)) - 1 for step in range(steps)]
    return [float(process.times[index]) for index in indices] + [0.0]


@dataclass(frozen=True)
class DDIM:
    """One call a step; needs noise (B, ...) for each step that does not end at data, unless eta is 0.

    Args:
        eta: share of fresh noise, in [0, 1]: 0 = none, 1 = that of DDPM.
    """

    eta: float = 0.0
    order: ClassVar[int] = 1

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"got an eta of {self.eta}; choose one in [0, 1] (0 = no fresh noise)")

    @property
    def needs_noise(self) -> bool:
        """Unless eta is 0."""
        return self.eta > 0

    def step(
        self, state: SolverState, denoiser: BoundDenoiser, t: float, s: float, noise: Tensor | None = None
    ) -> SolverState:
        """The state at time s from the state at time t."""
        velocity = denoiser(state.x, t).to(state.x.dtype)
        if self.eta == 0 or s == 0:
            return SolverState(state.x + (s - t) * velocity)
        if noise is None:
            raise UserError("DDIM with an eta above 0 draws noise in every step; give noise, or choose an eta of 0")
        if not 0 < s < t:
            raise UserError(f"fresh noise is for steps towards data; got one from {t} to {s}, choose an eta of 0")
        x0, eps = state.x - t * velocity, state.x + (1 - t) * velocity
        length_t, length_s = math.hypot(1 - t, t), math.hypot(1 - s, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((1 - t) / length_t, t / length_t), ((1 - s) / length_s, s / length_s)
        fresh = self.eta * sigma_s / sigma_t * math.sqrt(1 - (alpha_t / alpha_s) ** 2)
        z = alpha_s * x0 + math.sqrt(sigma_s**2 - fresh**2) * eps + fresh * noise
        return SolverState(length_s * z)


def sample_ddim(
    denoiser: Denoiser,
    noise: Tensor,
    process: BetaProcess,
    steps: int = 50,
    *,
    eta: float = 0.0,
    cond: Cond | None = None,
    uncond: Cond | None = None,
    guidance: float = 1.0,
    schedule: Sequence[float] | None = None,
    generator: Generators | None = None,
    progress: bool | None = True,
) -> Tensor:
    """Draws samples.

    Args:
        denoiser: `(x, t, cond) -> velocity`, such as an `EpsDenoiser`.
        noise: standard normal (B, ...), z at the noisiest timestep.
        process: of the model.
        steps: of the schedule.
        eta: share of fresh noise.
        cond: conditioning of the B samples.
        uncond: of the unconditional branch, needed if guidance is not 1.
        guidance: scale of classifier-free guidance.
        schedule: of times; None = `ddim_schedule(process, steps)`.
        generator: source of fresh noise, needed if eta is above 0.
        progress: whether a bar may be shown.
    """
    schedule = ddim_schedule(process, steps) if schedule is None else schedule
    start = noise * math.hypot(1 - schedule[0], schedule[0])
    return sample(
        denoiser, start, schedule, DDIM(eta), cond=cond, uncond=uncond, guidance=Guidance(guidance),
        generator=generator, progress=progress,
    ).x  # fmt: skip
