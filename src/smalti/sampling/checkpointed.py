"""A sampling run with exact gradients in the memory of one step.

The run is made without a graph; only the states before its steps and the noise of stochastic solvers are stored. The
gradient of a loss on the final sample goes back step by step: each is computed again from its stored state, now with
its graph, and its vector-Jacobian product gives the gradients of the weights, which add up, and of the state before:

    g_w <- g_w + (d x_s / d w)^T g,    g <- (d x_s / d x_t)^T g

through the denoiser, guidance and the solver's own algebra, also through what multistep solvers remember. That costs
one more forward pass than a full graph, and activations of one step instead of T.

Source: EcoDiff (arXiv 2412.02852), section 3, "time step gradient checkpointing".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smalti.core.protocols import Cond, Denoiser, Generators, SolverState
from smalti.sampling.guidance import BoundDenoiser, Guidance, bind
from smalti.sampling.loop import sample
from smalti.sampling.solvers import LoopSolver


def sample_checkpointed(
    denoiser: Denoiser,
    x: Tensor,
    schedule: Sequence[float],
    solver: LoopSolver,
    weights: Sequence[Tensor] = (),
    *,
    cond: Cond | None = None,
    uncond: Cond | None = None,
    guidance: Guidance | None = None,
    generator: Generators | None = None,
) -> Tensor:
    """`loop.sample` from beginning to end, with gradients to its start and to some of what the denoiser is made of.

    Args:
        denoiser: `(x (B, ...), t (B,), cond) -> velocity (B, ...)`, the same at every call: dropout off, and whatever
            it draws drawn before. One that draws anew at each call gets the gradient of its second draw.
        x: the sample (B, ...) at the first time.
        schedule: the times to visit.
        solver: takes the steps.
        weights: tensors that the denoiser uses and that require gradients: parameters, masks, embeddings. Those made
            from others (a mask from its logits) pass their gradients on.
        cond, uncond, guidance, generator: as in `loop.sample`.

    Returns:
        The final sample (B, ...), which takes part in a graph.

    Example:
        >>> final = sample_checkpointed(model, noise, schedule, Euler(), list(model.parameters()), cond=cond)
        >>> loss(final).backward()
    """
    bound = bind(denoiser, cond or Cond(), uncond, guidance)

    def record(start: Tensor) -> "_Recorder":
        recorder = _Recorder(solver)
        options: dict[str, Any] = {"cond": cond, "uncond": uncond, "guidance": guidance, "generator": generator}
        recorder.final = sample(denoiser, start, schedule, recorder, progress=False, **options).x
        return recorder

    return _Replay.apply(bound, record, x, *weights)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Step:
    """One step of a run: where it began, from and to which time, with which noise."""

    state: SolverState
    t: float
    s: float
    noise: Tensor | None


class _Recorder:
    """A solver that remembers the steps which it took."""

    def __init__(self, solver: LoopSolver):
        self.solver, self.steps = solver, []
        self.final: Any = None

    @property
    def needs_noise(self) -> bool:
        return self.solver.needs_noise

    def step(
        self, state: SolverState, denoiser: BoundDenoiser, t: float, s: float, noise: Tensor | None = None
    ) -> SolverState:
        self.steps.append(_Step(state, t, s, noise))
        return self.solver.step(state, denoiser, t, s, noise)


class _Replay(torch.autograd.Function):
    """The run forwards without a graph, and backwards step by step with one."""

    @staticmethod
    def forward(ctx: Any, bound: BoundDenoiser, record: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.bound, ctx.weights, ctx.recorder = bound, weights, record(x.detach())
        return ctx.recorder.final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        wanted = [one for one in ctx.weights if one.requires_grad]
        sums: list[Tensor | None] = [None] * len(wanted)
        gradients: list[Tensor | None] = [gradient]  # of the state after the step, its x first
        for step in reversed(ctx.recorder.steps):
            with torch.enable_grad():
                before = _leaves(step.state)
                outputs = _tensors(ctx.recorder.solver.step(before, ctx.bound, step.t, step.s, step.noise))
                pairs = [
                    (one, of)
                    for one, of in zip(outputs, gradients + [None] * len(outputs))
                    if of is not None and one.requires_grad
                ]
                inputs = _tensors(before)
                ends, of_ends = zip(*pairs)
                found = torch.autograd.grad(ends, [*inputs, *wanted], of_ends, allow_unused=True)
            gradients = list(found[: len(inputs)])
            sums = [_add(old, new) for old, new in zip(sums, found[len(inputs) :], strict=True)]
        added = iter(sums)
        of_weights = [next(added) if one.requires_grad else None for one in ctx.weights]
        return (None, None, gradients[0], *of_weights)


def _leaves(state: SolverState) -> SolverState:
    """A state whose tensors begin a new graph."""
    return state.map(lambda one: one.detach().requires_grad_() if one.is_floating_point() else one)


def _tensors(state: SolverState) -> list[Tensor]:
    """The floating-point tensors of a state, x first, always in the same order."""
    found: list[Tensor] = []

    def visit(one: Tensor) -> Tensor:
        if one.is_floating_point():
            found.append(one)
        return one

    state.map(visit)
    return found


def _add(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if old is None else old if new is None else old + new
