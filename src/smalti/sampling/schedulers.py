"""Schedulers of diffusers as solvers of our loop, at our times, and schedulers by name.

A flow scheduler's sigma is our t, and its model output is our velocity. A scheduler keeps its history inside; here
that history is taken out after every step into `SolverState` and put back before the next, so a step is pure and a
run may stop and go on anywhere. Schedulers that work with log(alpha / sigma) begin at sigma = 1 - 1e-6.

Sources: DPM-Solver++ (arXiv 2211.01095), UniPC (arXiv 2302.04867), as diffusers implements them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import SolverState
from smalti.sampling.guidance import BoundDenoiser
from smalti.sampling.sde_scheduler import FlowMatchSDEScheduler
from smalti.sampling.solvers import SDE, LoopSolver

LARGEST_SIGMA = 1 - 1e-6

SOLVERS: dict[str, Callable[..., Any]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpm++": partial(DPMSolverMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction"),
    "unipc": partial(UniPCMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction"),
    "sde": FlowMatchSDEScheduler,
}

_FLOW = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
_LOG_RATIO = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)


def make_scheduler(name: str) -> Any:
    """A scheduler for a pipeline of ours by name.

    Args:
        name: "euler", "heun", "dpm++" (second order, multistep), "unipc" or "sde".

    Raises:
        UserError: there is no such solver; the nearest names are offered.
    """
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    return SOLVERS[name]()


def solver_for(scheduler: Any, schedule: Sequence[float]) -> LoopSolver:
    """The solver that a scheduler stands for, along one decreasing schedule.

    Raises:
        UserError: the scheduler does not run flow models.
    """
    if isinstance(scheduler, FlowMatchSDEScheduler):
        return SDE(scheduler.config["strength"])
    return SchedulerSolver(scheduler, schedule)


class SchedulerSolver:
    """A flow scheduler of diffusers that steps along one schedule of ours.

    Args:
        scheduler: FlowMatchEuler, FlowMatchHeun, DPMSolverMultistep or UniPC; it is not changed. Its own shift and
            sigma options are not used: the schedule says where to step.
        schedule: decreasing times, the first in (0, 1], the last 0.

    Raises:
        UserError: the scheduler is of another kind or is not set up for flow models, or the schedule does not fall.
    """

    def __init__(self, scheduler: Any, schedule: Sequence[float]):
        _check(scheduler, schedule)
        self.schedule = [float(t) for t in schedule]
        self.prepared = _prepare(scheduler, self.schedule)
        self.needs_noise = str(scheduler.config.get("algorithm_type", "")).startswith("sde")

    def step(
        self, state: SolverState, denoiser: BoundDenoiser, t: float, s: float, noise: Tensor | None = None
    ) -> SolverState:
        """The state at time s from the state at time t, which are neighbours in the schedule."""
        index = self._index(t, s)
        scheduler = self._restore(state.memory, index)
        options = {"variance_noise": self._noise(noise, state.x)} if self.needs_noise else {}
        x = self._call(scheduler, denoiser(state.x, t), t, state.x, options)
        if s == 0:
            return SolverState(x)
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            x = self._call(scheduler, denoiser(x, s), s, x, options)
        return SolverState(x, self._memory(scheduler))

    def _call(self, scheduler: Any, velocity: Tensor, t: float, x: Tensor, options: dict) -> Tensor:
        return scheduler.step(velocity.to(x.dtype), t * 1000.0, x, return_dict=False, **options)[0]

    def _index(self, t: float, s: float) -> int:
        for index in range(len(self.schedule) - 1):
            if self.schedule[index] == t and self.schedule[index + 1] == s:
                return index
        raise UserError(f"a step from {t} to {s} is not in the schedule that this scheduler was prepared for")

    def _noise(self, noise: Tensor | None, x: Tensor) -> Tensor:
        if noise is None:
            raise UserError("this scheduler draws noise in every step; give noise, or choose another solver")
        return noise.to(x.dtype)

    def _restore(self, memory: Mapping[str, Any], index: int) -> Any:
        """A scheduler that stands where `memory` was taken, or at step `index` with no history."""
        scheduler = copy.copy(self.prepared)
        for name, value in vars(self.prepared).items():
            if isinstance(value, list):
                vars(scheduler)[name] = list(value)
        for name, value in memory.items():
            vars(scheduler)[name] = list(value.values()) if isinstance(value, Mapping) else value
        if not memory:
            doubled = isinstance(scheduler, FlowMatchHeunDiscreteScheduler)
            scheduler.set_begin_index(2 * index if doubled else index)
        return scheduler

    def _memory(self, scheduler: Any) -> dict[str, Any]:
        """What a step has changed; lists become mappings, whose tensors `SolverState` can move."""
        fresh = vars(self.prepared)
        memory: dict[str, Any] = {}
        for name, value in vars(scheduler).items():
            if isinstance(value, list):
                memory[name] = dict(enumerate(value))
            elif name not in fresh or value is not fresh[name]:
                memory[name] = value
        return memory


def _check(scheduler: Any, schedule: Sequence[float]) -> None:
    kinds = _FLOW + _LOG_RATIO
    if type(scheduler) not in kinds:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{type(scheduler).__name__} does not run flow models here; choose one of {names}")
    config = scheduler.config
    if isinstance(scheduler, _LOG_RATIO) and not (
        config.prediction_type == "flow_prediction" and config.use_flow_sigmas
    ):
        raise UserError(
            f"{type(scheduler).__name__} is set up for {config.prediction_type}; "
            "make it with prediction_type='flow_prediction', use_flow_sigmas=True"
        )
    if config.get("stochastic_sampling") or config.get("invert_sigmas") or config.get("solver_p"):
        raise UserError(
            f"{type(scheduler).__name__} with stochastic_sampling, invert_sigmas or solver_p is not supported; "
            "turn them off, or choose the solver 'sde' for noise in every step"
        )
    falls = all(t > s for t, s in pairwise(schedule))
    if len(schedule) < 2 or not falls or not 0 < schedule[0] <= 1 or schedule[-1] != 0:
        raise UserError("a diffusers scheduler needs a schedule that falls from at most 1 to 0")


def _prepare(scheduler: Any, schedule: list[float]) -> Any:
    """A copy of the scheduler whose sigmas are the schedule's times."""
    prepared = type(scheduler).from_config(scheduler.config, use_dynamic_shifting=False)
    prepared.set_timesteps(len(schedule) - 1)
    sigmas = torch.tensor(schedule, dtype=torch.float32)
    if isinstance(scheduler, _LOG_RATIO):
        sigmas = sigmas.clamp(max=LARGEST_SIGMA)
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    prepared.sigmas = sigmas
    prepared.timesteps = sigmas[:-1] * 1000
    prepared.set_begin_index(0)
    return prepared
