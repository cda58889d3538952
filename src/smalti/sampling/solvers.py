"""Solvers of the flow's ODE and of its SDE: pure steps from time t to time s, in either direction.

ODE: `dx/dt = velocity(x, t)`. SDE with the same marginals: `dx = (v -+ w/2 score) dt + sqrt(w) dW` towards data (minus)
or noise (plus), here with `w(t) = strength * t`, for which `w * score = -strength * noise_estimate` is finite
everywhere. Sources: Euler, Heun and midpoint (any textbook; EDM, arXiv 2206.00364, algorithm 1 leaves out the
correction at t = 0 likewise); SDE: SiT (arXiv 2401.08740), section 2.2, with the last step to data taken without noise.

A solver is a frozen dataclass; what it must remember lives in `SolverState`, so a run may stop and go on anywhere.
The denoiser is called as `denoiser(x, t)` with t a float (see `guidance.bind`). States are float32.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Solver, SolverState
from smalti.sampling.guidance import BoundDenoiser


class LoopSolver(Solver, Protocol):
    """A solver that the loop can drive: it says whether each step needs noise of the shape of x."""

    @property
    def needs_noise(self) -> bool: ...


@dataclass(frozen=True)
class Euler:
    """First order, one call a step."""

    order: ClassVar[int] = 1

    @property
    def needs_noise(self) -> bool:
        """Never: the path is deterministic."""
        return False

    def step(
        self, state: SolverState, denoiser: BoundDenoiser, t: float, s: float, noise: Tensor | None = None
    ) -> SolverState:
        """The state at time s from the state at time t."""
        return SolverState(state.x + (s - t) * _velocity(denoiser, state.x, t))


@dataclass(frozen=True)
class Heun:
    """Second order, two calls a step, one where it ends at data (s = 0)."""

    order: ClassVar[int] = 2

    @property
    def needs_noise(self) -> bool:
        """Never: the path is deterministic."""
        return False

    def step(
        self, state: SolverState, denoiser: BoundDenoiser, t: float, s: float, noise: Tensor | None = None
    ) -> SolverState:
        """The state at time s from the state at time t."""
        first = _velocity(denoiser, state.x, t)
        x = state.x + (s - t) * first
        if s == 0:
            return SolverState(x)
        second = _velocity(denoiser, x, s)
        return SolverState(state.x + (s - t) * (first + second) / 2)


@dataclass(frozen=True)
class Midpoint:
    """Second order, two calls a step: the slope half way."""

    order: ClassVar[int] = 2

    @property
    def needs_noise(self) -> bool:
        """Never: the path is deterministic."""
        return False

    def step(
        self, state: SolverState, denoiser: BoundDenoiser, t: float, s: float, noise: Tensor | None = None
    ) -> SolverState:
        """The state at time s from the state at time t."""
        half = (s - t) / 2
        middle = state.x + half * _velocity(denoiser, state.x, t)
        return SolverState(state.x + (s - t) * _velocity(denoiser, middle, t + half))


@dataclass(frozen=True)
class SDE:
    """Euler-Maruyama, one call a step; needs noise (B, ...) for each step that does not end at data.

    Args:
        strength: diffusion in units of t, `w(t) = strength * t`; 0 is Euler, 1 is what SiT calls w = sigma.
    """

    strength: float = 1.0
    order: ClassVar[int] = 1

    def __post_init__(self):
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise UserError(f"got a diffusion strength of {self.strength}; choose a number of at least 0")

    @property
    def needs_noise(self) -> bool:
        """Every step that does not end at data draws noise."""
        return True

    def step(
        self, state: SolverState, denoiser: BoundDenoiser, t: float, s: float, noise: Tensor | None = None
    ) -> SolverState:
        """The state at time s from the state at time t, with one standard normal `noise` of the shape of x."""
        velocity = _velocity(denoiser, state.x, t)
        if s == 0 or self.strength == 0:
            return SolverState(state.x + (s - t) * velocity)
        if noise is None:
            raise UserError("the SDE solver draws noise in every step; give noise, or choose another solver")
        span = abs(s - t)
        estimate = state.x + (1 - t) * velocity  # of the noise; w * score = -strength * estimate
        drift = state.x + (s - t) * velocity - 0.5 * self.strength * span * estimate
        return SolverState(drift + math.sqrt(self.strength * t * span) * noise)


def _velocity(denoiser: BoundDenoiser, x: Tensor, t: float) -> Tensor:
    return denoiser(x, t).to(x.dtype)
