"""Dormand-Prince 5(4): a solver that chooses its own steps by the error that it sees.

Seven slopes give a solution of fifth order, on which the run goes on, and one of fourth; their difference e is the
error of a trial of size h. With the norm

    r = sqrt(mean (e / (atol + rtol * max(|x|, |x'|)))^2),

the trial is taken if r <= 1, else repeated, and in either case `h <- h * min(10, max(0.2, 0.9 r^(-1/5)))`, which does
not grow right after a rejection. The last slope of a taken trial is the first one of the next.

The mean runs over the whole batch, so how many calls a run takes depends on who shares it. With `per_sample` every
sample has its own error, size and time: what it becomes does not depend on its batch, which runs until all are done.
Times are float64, states stay in their dtype. What is rounded coarsely (bf16) never meets a tight tolerance: below the
smallest step every trial is taken, and counted as forced.

Source: Dormand and Prince 1980, J. Comput. Appl. Math. 6(1), table 2 (RK5(4)7M); step sizes and the first one, Hairer,
Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4. LFM (arXiv 2307.08698) samples with it.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import SolverState, TensorBundle
from smalti.core.time import expand_time
from smalti.sampling.guidance import BoundDenoiser

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERRORS = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0


@dataclass(frozen=True)
class Effort(TensorBundle):
    """What a run has taken so far, for each sample (B,) long; without `per_sample` all entries are equal.

    Args:
        calls: of the denoiser (NFE); with guidance a call of both branches counts once.
        taken, rejected: trials.
        forced: trials taken in spite of their error, because they were of the smallest size.
    """

    calls: Tensor
    taken: Tensor
    rejected: Tensor
    forced: Tensor


@dataclass(frozen=True)
class Dopri5:
    """Adaptive solver; a step of the loop is as many trials as it needs, so `[1.0, 0.0]` is a whole schedule.

    Args:
        atol, rtol: error allowed in a trial, absolute and relative to the sample; above 0.
        min_step: smallest trial in units of t, at most 0.1; it bounds a run at about 6 / min_step calls.
        per_sample: whether each sample has steps of its own; needs a denoiser that takes times (B,), as `bind` makes.

    Raises:
        UserError: a value is out of range.

    Example:
        >>> state = sample(model, noise, [1.0, 0.0], Dopri5(1e-5, 1e-5))
        >>> int(effort(state).calls[0])
    """

    atol: float = 1e-5
    rtol: float = 1e-5
    min_step: float = 1e-3
    per_sample: bool = False
    order: ClassVar[int] = 5

    def __post_init__(self):
        if not (self.atol > 0 and self.rtol > 0 and 0 < self.min_step <= 0.1):
            raise UserError(f"got {self}; tolerances are above 0 and the smallest step is in (0, 0.1]")

    @property
    def needs_noise(self) -> bool:
        """Never: the path is deterministic."""
        return False

    def step(
        self, state: SolverState, denoiser: BoundDenoiser, t: float, s: float, noise: Tensor | None = None
    ) -> SolverState:
        """The state at time s from the state at time t; the memory keeps the next size and the effort.

        Raises:
            UserError: the denoiser's values are not finite.
        """
        if t == s or not len(state.x):
            return state
        walk = _Walk(self, denoiser, state, t, s)
        while walk.is_under_way:
            walk.trial()
        return SolverState(walk.x, walk.memory())


def effort(state: SolverState) -> Effort:
    """What a run of `Dopri5` has taken.

    Raises:
        UserError: the state is of another solver.
    """
    if "calls" not in state.memory:
        raise UserError("this state counts nothing; give one that Dopri5 has reached")
    return Effort(**{one.name: state.memory[one.name] for one in fields(Effort)})


class _Walk:
    """From t to s. R is the number of step sizes: one for the batch, or one a sample; their tensors are float64."""

    def __init__(self, solver: Dopri5, denoiser: BoundDenoiser, state: SolverState, t: float, s: float):
        self.solver, self.denoiser = solver, denoiser
        self.x, self.end, self.sign = state.x, s, 1.0 if s > t else -1.0
        rows = len(self.x) if solver.per_sample else 1
        self.time = torch.full((rows,), t, dtype=torch.float64)
        self.counts = {one.name: state.memory.get(one.name, self._zeros()).clone() for one in fields(Effort)}
        self.was_rejected = torch.zeros(rows, dtype=torch.bool)
        self.first = self._slope(self.x, self.time)
        kept = state.memory.get("size")
        self.size = self._first_size() if kept is None else kept[:rows].clone()

    @property
    def is_under_way(self) -> bool:
        return bool((self.time != self.end).any())

    def trial(self) -> None:
        """One trial of every sample that is not there yet."""
        left = (self.end - self.time).abs()
        size = torch.minimum(self.size, left)
        span = self._wide(self.sign * size)
        slopes, new = [self.first], self.x
        for node, weights in zip(NODES, WEIGHTS, strict=True):
            new = self.x + span * _combine(weights, slopes)
            slopes.append(self._slope(new, self.time + self.sign * node * size))
        ratio = self._norm(span * _combine(ERRORS, slopes), new)
        is_small, is_open = size <= self.solver.min_step, left > 0
        if not ratio[is_small].isfinite().all():
            raise UserError(
                f"the denoiser's values are not finite near t = {float(self.time[0]):.4g}; look at the model"
            )
        is_good = (ratio <= 1) | is_small
        self._count(taken=is_good & is_open, rejected=~is_good & is_open, forced=is_small & (ratio > 1) & is_open)
        arrived = torch.where(size == left, torch.full_like(left, self.end), self.time + self.sign * size)
        self.time = torch.where(is_good, arrived, self.time)
        chosen = self._wide(is_good)
        self.x, self.first = torch.where(chosen, new, self.x), torch.where(chosen, slopes[-1], self.first)
        self._resize(size, ratio, is_good, is_open)

    def memory(self) -> dict[str, Tensor]:
        return {"size": self.size.expand(len(self.x)).clone(), **self.counts}

    def _resize(self, size: Tensor, ratio: Tensor, is_good: Tensor, is_open: Tensor) -> None:
        factor = (SAFETY * ratio.clamp_min(1e-10) ** -0.2).nan_to_num(SHRINK).clamp(SHRINK, GROW)
        factor = torch.where(self.was_rejected | ~is_good, factor.clamp(max=1.0), factor)
        wanted = (size * factor).clamp_min(self.solver.min_step)
        # a trial that was cut short at the end says nothing against longer ones
        wanted = torch.where(is_good & (size < self.size), torch.maximum(wanted, self.size), wanted)
        self.size = torch.where(is_open, wanted, self.size)
        self.was_rejected = ~is_good

    def _first_size(self) -> Tensor:
        """A size at which the slope changes little, by one explicit step."""
        level, slope = self._norm(self.x, self.x), self._norm(self.first, self.x)
        left = (self.end - self.time).abs()
        tried = torch.where((level < 1e-5) | (slope < 1e-5), 1e-6, 0.01 * level / slope).minimum(left)
        ahead = self.x + self._wide(self.sign * tried) * self.first
        bend = self._norm(self._slope(ahead, self.time + self.sign * tried) - self.first, self.x) / tried
        steepest = torch.maximum(slope, bend)
        found = torch.where(steepest <= 1e-15, (1e-3 * tried).clamp_min(1e-6), (0.01 / steepest) ** 0.2)
        return torch.minimum(100 * tried, found).nan_to_num(0.0).clamp_min(self.solver.min_step)

    def _slope(self, x: Tensor, time: Tensor) -> Tensor:
        self._count(calls=self.time != self.end)
        t: Any = time.to(x.device) if self.solver.per_sample else float(time)
        return self.denoiser(x, t).to(x.dtype)

    @torch.no_grad()
    def _norm(self, value: Tensor, new: Tensor) -> Tensor:
        """r (R,) of a value (B, ...) between the samples x and `new`."""
        allowed = self.solver.atol + self.solver.rtol * torch.maximum(self.x.abs(), new.abs())
        squares = (value.float() / allowed.float()).square().flatten(1).mean(1).double().cpu()
        return (squares if self.solver.per_sample else squares.mean(0, keepdim=True)).sqrt()

    def _wide(self, of_rows: Tensor) -> Tensor:
        """(R,) made broadcastable with x, numbers in its dtype."""
        placed = of_rows.to(self.x.device)
        return expand_time(placed if placed.dtype == torch.bool else placed.to(self.x.dtype), self.x)

    def _count(self, **happened: Tensor) -> None:
        for name, rows in happened.items():
            self.counts[name] += rows.long()

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.x), dtype=torch.long)


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """The weighted sum of slopes (B, ...)."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = total + weight * slope
    return total
