"""The sampling loop: a denoiser, a schedule, a solver; nothing of any model, tokenizer or prompt.

Every step gives its callback the state after the step and a preview, the estimate of x0 by the step's first call
(`x - t * velocity`). The bar appears on the error stream when a run takes longer than two seconds.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from smalti.core.errors import UserError
from smalti.core.protocols import Cond, Denoiser, Generators, SolverState
from smalti.core.seeds import randn
from smalti.core.time import denoised_from_velocity
from smalti.sampling.guidance import BoundDenoiser, Guidance, bind
from smalti.sampling.solvers import LoopSolver

BAR_DELAY = 2.0


@dataclass(frozen=True)
class SampleStep:
    """What a callback sees after a step.

    Args:
        step: index of the step.
        steps: number of steps of the whole schedule.
        t: time before the step.
        s: time after it.
        state: the solver's state after it; with `step` + 1 a run can go on from here.
        denoised: estimate of x0 (B, ...) made in this step.
    """

    step: int
    steps: int
    t: float
    s: float
    state: SolverState
    denoised: Tensor

    @property
    def x(self) -> Tensor:
        """The sample (B, ...) after the step."""
        return self.state.x


Callback = Callable[[SampleStep], Tensor | None]
"""Sees a step; a tensor that it returns replaces the sample."""


def sample(
    denoiser: Denoiser,
    x: Tensor | SolverState,
    schedule: Sequence[float],
    solver: LoopSolver,
    *,
    cond: Cond | None = None,
    uncond: Cond | None = None,
    guidance: Guidance | None = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
    is_interrupted: Callable[[], bool] | None = None,
    progress: bool | None = True,
    first_step: int = 0,
) -> SolverState:
    """Carries a sample along a schedule; gradients flow if the caller leaves them on.

    Args:
        denoiser: `(x (B, ...), t (B,), cond) -> velocity (B, ...)`.
        x: the sample (B, ...) at the time `schedule[first_step]`, or the state of a run that goes on.
        schedule: the times to visit, in either direction.
        solver: takes the steps.
        cond: conditioning of the B samples.
        uncond: conditioning of the unconditional branch, needed if guidance acts.
        guidance: None = the conditional branch alone.
        generator: source of the noise of stochastic solvers; one a sample keeps samples free of their batch.
        callback: called after every step.
        is_interrupted: asked before every step; once True, the run ends with the state reached.
        progress: whether a bar may be shown; None = on a terminal only.
        first_step: step at which the run begins.

    Returns:
        The state at the end; its `x` is the sample.

    Raises:
        UserError: the schedule is too short, or a stochastic solver got no generator.
    """
    steps = len(schedule) - 1
    if steps < 1 or not 0 <= first_step <= steps:
        raise UserError(
            f"got a schedule of {len(schedule)} times and a first step of {first_step}; give at least 2 times"
        )
    if solver.needs_noise and generator is None:
        raise UserError("this solver draws noise in every step; give a generator, or choose another solver")
    state = x if isinstance(x, SolverState) else SolverState(x)
    watched = _Watched(bind(denoiser, cond or Cond(), uncond, guidance))
    with tqdm(
        total=steps, initial=first_step, delay=BAR_DELAY, file=sys.stderr, disable=not progress, leave=False
    ) as bar:
        for step in range(first_step, steps):
            if is_interrupted is not None and is_interrupted():
                break
            t, s = schedule[step], schedule[step + 1]
            watched.denoised = None
            state = solver.step(state, watched, t, s, _noise(solver, state.x, s, generator))
            if callback is not None:
                assert watched.denoised is not None, "a solver steps without calling the denoiser"
                replaced = callback(SampleStep(step, steps, t, s, state, watched.denoised))
                state = state if replaced is None else SolverState(replaced, state.memory)
            bar.update()
    return state


class _Watched:
    """A bound denoiser that keeps the estimate of x0 of its first call."""

    def __init__(self, denoiser: BoundDenoiser):
        self.denoiser = denoiser
        self.denoised: Tensor | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        velocity = self.denoiser(x, t)
        if self.denoised is None:
            self.denoised = denoised_from_velocity(x, velocity, torch.as_tensor(t, dtype=x.dtype, device=x.device))
        return velocity


def _noise(solver: LoopSolver, x: Tensor, s: float, generator: Generators | None) -> Tensor | None:
    if not solver.needs_noise or generator is None or (s == 0):
        return None
    return randn(x.shape, generator, x.device).to(x.dtype)
