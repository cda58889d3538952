"""Guidance by the difference of two predictions, limited to an interval of time if wanted.

`velocity = u + scale * (c - u)` with the velocities c of the conditional and u of the unconditional branch. Outside
the interval [low, high] of t only the conditional branch runs: guidance at high noise costs variety, at low noise it
does little, and each step outside saves half its work.

With `channels` only the first of them are guided, as LightningDiT (arXiv 2501.01423) does it in its code.

Autoguidance takes the difference to a weaker model instead, smaller and less trained, with the same conditions:
`velocity = v' + scale * (v - v')`.

Source: classifier-free guidance (arXiv 2207.12598, equation 6 with scale = 1 + w); interval (arXiv 2404.07724);
autoguidance (arXiv 2406.02507, equation 3).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Cond, Denoiser
from smalti.core.time import expand_time

BoundDenoiser = Callable[[Tensor, float], Tensor]
"""A denoiser with its conditioning bound: `(x (B, ...), t) -> velocity (B, ...)`, one t for all samples.

What `bind` makes takes a time of each sample (B,) as well, for solvers that let samples walk apart."""


@dataclass(frozen=True)
class Guidance:
    """How strongly the prompt pulls, and when.

    Args:
        scale: 1 = conditional branch alone, 0 = unconditional, above 1 = guidance.
        interval: (low, high), the times in [0, 1] between which guidance acts, both included.
        is_batched: both branches go through the model as one batch of 2B rows (unconditional first); else in turn.
        channels: guidance acts on the first so many channels of the sample alone; None = on all. LightningDiT's scales
            of 6.7 and 10 are for 3 of 32 channels; on all, 1.5 to 3 are as strong.

    Raises:
        UserError: the scale is not a finite number, or the interval is not within [0, 1].
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    is_batched: bool = True
    channels: int | None = None

    def __post_init__(self):
        _check(self.scale, self.interval)
        if self.channels is not None and (isinstance(self.channels, bool) or self.channels < 1):
            raise UserError(f"got guidance on {self.channels} channels; choose a whole number of at least 1, or none")

    def acts_at(self, t: float) -> bool:
        """Whether both branches are needed at time t."""
        return self.scale != 1 and self.interval[0] <= t <= self.interval[1]

    def scales_at(self, t: Tensor) -> Tensor:
        """The scale for each of the times (B,): 1 where guidance does not act."""
        acts = (self.interval[0] <= t) & (t <= self.interval[1])
        return torch.where(acts, self.scale, 1.0)


@dataclass(frozen=True)
class Autoguidance:
    """A denoiser guided by a weaker one of the same task; it is a denoiser, so guidance by conditions may be added.

    Args:
        weak: `(x, t, cond) -> velocity`, of fewer parameters or fewer steps of training.
        scale: w; 1 = the strong one alone.
        interval: (low, high), the times in [0, 1] between which it acts, both included.

    Raises:
        UserError: the scale is not a finite number, or the interval is not within [0, 1].

    Example:
        >>> strong, weak = (lambda x, t, cond: 2 * x), (lambda x, t, cond: x)
        >>> Autoguidance(weak, 1.5).around(strong)(torch.ones(1), torch.ones(1), Cond())
        tensor([2.5000])
    """

    weak: Denoiser
    scale: float = 1.42
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        _check(self.scale, self.interval)

    def around(self, strong: Denoiser) -> Denoiser:
        """The guided denoiser; where no sample's time lies in the interval, the weak one does not run."""

        def velocity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            found = strong(x, t, cond)
            acts = (t >= self.interval[0]) & (t <= self.interval[1])
            if self.scale == 1 or not acts.any():
                return found
            behind = self.weak(x, t, cond)
            guided = behind + self.scale * (found - behind)
            return torch.where(acts.reshape(acts.shape[:1] + (1,) * (x.ndim - 1)), guided, found)

        return velocity


def _check(scale: float, interval: tuple[float, float]) -> None:
    if not math.isfinite(scale) or scale < 0:
        raise UserError(f"got a guidance scale of {scale}; choose a number of at least 0 (1 = off)")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:  # a list from json will do
        raise UserError(f"got a guidance interval of {interval}; choose (low, high) within [0, 1]")


def bind(denoiser: Denoiser, cond: Cond, uncond: Cond | None = None, guidance: Guidance | None = None) -> BoundDenoiser:
    """Binds conditioning and guidance to a denoiser.

    Args:
        denoiser: `(x (B, ...), t (B,), cond) -> velocity (B, ...)`.
        cond: conditioning of B samples.
        uncond: conditioning of the unconditional branch, with the same fields; needed if guidance acts.
        guidance: None = the conditional branch alone.

    Returns:
        `(x, t) -> velocity` for a solver.

    Raises:
        UserError: guidance is asked for without an unconditional branch.
    """
    guidance = guidance or Guidance()
    if guidance.scale != 1 and uncond is None:
        raise UserError(f"guidance of {guidance.scale} needs an unconditional branch; give one, or choose a scale of 1")
    both = Cond.cat([uncond, cond]) if uncond is not None and guidance.scale != 1 and guidance.is_batched else None

    def velocity(x: Tensor, t: float | Tensor) -> Tensor:
        times = torch.as_tensor(t, device=x.device, dtype=torch.float32).expand(len(x))
        if isinstance(t, Tensor):
            scale = expand_time(guidance.scales_at(times), x)
            acts = bool((scale != 1).any())
        else:
            scale, acts = guidance.scale, guidance.acts_at(t)
        if uncond is None or not acts:
            return denoiser(x, times, cond)
        if both is not None:
            without, given = denoiser(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
        else:
            without, given = denoiser(x, times, uncond), denoiser(x, times, cond)
        guided = without + scale * (given - without)
        if guidance.channels is None:
            return guided
        return torch.cat([guided[:, : guidance.channels], given[:, guidance.channels :]], 1)

    return velocity
