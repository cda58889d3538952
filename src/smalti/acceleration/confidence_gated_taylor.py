"""Confidence-gated Taylor: only the first block runs as long as its own forecast is good.

Two Taylor series over the evaluations, on whole token streams: the probe, the image tokens after the first block, and
the target, what the last block returns. The first block always runs. Its output against the forecast,

    error = mean |forecast - output| / mean |output|,

tells how far extrapolation over this gap can be trusted. Below `tau` all other blocks pass their streams on untouched
and the last returns its forecast; else everything runs and both series take their new values. They are renewed in no
other step, so both look over the same gap. With `order` and `probe_order` 0 this is First-Block-Cache: the last full
evaluation is repeated while the first block changes little.

Source: Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor (arXiv 2508.02240),
section 3. Added here: a cap on forecasts in a row, and the worst sample of a batch as judge.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from smalti.core.errors import Refusal, UserError, unknown_name
from smalti.core.method import BlockCall, BlockMethod, Moment, Reading
from smalti.ops.taylor import TaylorState, kept_bytes, predict, update
from smalti.seams.schedule import is_late

REDUCTIONS = ("mean", "max")
TRACES = 32
"""Newest traces that a method keeps."""


@dataclass
class Trace:
    """What the gate did in one run and branch, by evaluation.

    Args:
        full: whether it was full.
        errors: of the probe; None where it was not asked.
        blocks: that a full evaluation runs from the probe on.
    """

    full: list[bool] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)
    blocks: int = 0

    @property
    def skipped(self) -> float:
        """Share of evaluations that were forecast."""
        return 1 - sum(self.full) / len(self.full) if self.full else 0.0

    @property
    def speedup(self) -> float:
        """Blocks of a run without the gate over blocks that ran."""
        return 1 / (1 - self.skipped * (1 - 1 / self.blocks)) if self.blocks else 1.0


@dataclass
class Memory:
    """What is remembered in one run and branch.

    Args:
        trace: of the run so far.
        probe: series of the image tokens after the first block.
        target: series of what the last block returns, by stream.
        evaluation: the current one.
        block: how many blocks came after the probe in it.
        forecasts: since the last full evaluation.
    """

    trace: Trace
    probe: TaylorState
    target: dict[str, TaylorState] = field(default_factory=dict)
    evaluation: int = -1
    block: int = 0
    forecasts: int = 0


@dataclass(frozen=True)
class ConfidenceGatedTaylor(BlockMethod):
    """Forecasts the last block while the first one is forecast well.

    The first evaluation is always full, and so is the last step where the pipeline (or `handle.run(steps=...)`) says
    how many there are. Every branch of guidance decides for itself; branches in one batch share a decision. Useful
    thresholds differ by a factor of 40 between models: find one with `evaluation.calibration.calibrate`.

    Args:
        tau: largest relative error of the probe at which blocks are skipped; 0 skips nothing.
        order: highest derivative of the target.
        probe_order: highest derivative of the probe.
        warmup: full evaluations at the beginning, at least 2: one value has no derivative to be wrong about.
        max_skip: most forecasts in a row; None = no limit.
        reduction: mean takes one error over the batch, max that of the worst sample.
        forced: evaluations that are forecast, and no others, whatever the probe says: for timing with random weights.

    Raises:
        UserError: a value is out of range.
    """

    tau: float = 0.1
    order: int = 1
    probe_order: int = 2
    warmup: int = 3
    max_skip: int | None = None
    reduction: Literal["mean", "max"] = "mean"
    forced: tuple[int, ...] = ()

    owns = frozenset({"sublayer outputs"})
    work = "less"

    def __post_init__(self):
        for name, low in (("tau", 0), ("order", 0), ("probe_order", 0), ("warmup", 2), ("max_skip", 1)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise UserError(f"ConfidenceGatedTaylor got {name}={value}; give a number from {low}")
        if self.reduction not in REDUCTIONS:
            raise unknown_name("reduction of ConfidenceGatedTaylor", self.reduction, REDUCTIONS)
        if self.forced and min(self.forced) < self.warmup:
            raise UserError(f"got forced forecasts from evaluation {min(self.forced)}; warm-up ends at {self.warmup}")
        object.__setattr__(self, "_traces", deque(maxlen=TRACES))

    @classmethod
    def neutral(cls) -> Self:
        return cls(tau=0)

    @classmethod
    def active(cls) -> Self:
        return cls(tau=1e6, warmup=2, max_skip=2)

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (cls(tau=1e6, reduction="max", order=0, probe_order=0), cls(tau=0, forced=(3, 4, 7, 8)))

    @classmethod
    def candidates(cls, steps: int, speedup: float) -> "tuple[Self, ...]":
        return tuple(cls(tau, order=2, probe_order=1) for tau in (0.05, 0.1, 0.2, 0.03, 0.4, 0.02))

    @property
    def is_neutral(self) -> bool:
        return not self.tau and not self.forced

    @property
    def traces(self) -> tuple[Trace, ...]:
        """What the gate did in its newest runs, a trace for each branch (and model), oldest first."""
        return tuple(self._traces)  # type: ignore[attr-defined]  # set beside the fields: a log, no setting

    def idle_reason(self, evaluations: int) -> str:
        idle = (trace for trace in self.traces if all(trace.full))
        errors = [error for trace in idle for error in trace.errors if error is not None]
        if not errors:
            return f"{evaluations} evaluations are no more than warm-up (warmup={self.warmup}) and the last step"
        return (
            f"the first block was never forecast better than to {min(errors):.3g}, and tau is {self.tau:g}; with few "
            "steps, each far from the last, there is nothing to gain: a higher tau would spoil the picture"
        )

    def check(self, reading: Reading) -> None:
        if len(reading.of_kind("block")) < 2:
            raise Refusal(f"{reading.model} has a single block, so there is nothing to skip behind the first")

    def init(self) -> Memory:
        trace = Trace()
        self._traces.append(trace)  # type: ignore[attr-defined]
        return Memory(trace, TaylorState(self.probe_order))

    def kept(self, state: Memory) -> int:
        return sum(kept_bytes(one) for one in (state.probe, *state.target.values()))

    def at_block(self, state: Memory, call: BlockCall) -> Mapping[str, Tensor]:
        if self.is_neutral:
            return call.run(call.streams)
        if call.moment.evaluation != state.evaluation:
            return self._first(state, call)
        state.block += 1
        if state.trace.full[-1]:
            return self._renew(state, call)
        if state.block < state.trace.blocks - 1:
            return call.streams
        return {kind: predict(one, float(state.evaluation)) for kind, one in state.target.items()}

    def _first(self, state: Memory, call: BlockCall) -> Mapping[str, Tensor]:
        """The first block that sees image tokens: it runs, and is what the decision rests on."""
        streams = call.run(call.streams)
        kind = next((kind for kind in ("image", "joint") if kind in streams), None)
        if kind is None:  # blocks that refine the text alone
            return streams
        state.evaluation, state.block = call.moment.evaluation, 0
        error = None
        if not self._must_run(state, call.moment):
            error = relative_error(predict(state.probe, float(state.evaluation)), streams[kind], self.reduction)
        is_full = error is None or not (error < self.tau or self.forced)
        state.forecasts = 0 if is_full else state.forecasts + 1
        state.trace.full.append(is_full)
        state.trace.errors.append(error)
        if is_full:
            update(state.probe, streams[kind], float(state.evaluation))
        else:
            call.note("forecast")
        return streams

    def _must_run(self, state: Memory, moment: Moment) -> bool:
        """Whether an evaluation is full without asking the probe."""
        index = len(state.trace.full)
        if index < self.warmup or not state.target:
            return True
        if self.forced:
            return index not in self.forced
        return state.forecasts == self.max_skip or (moment.steps is not None and is_late(moment, 1))

    def _renew(self, state: Memory, call: BlockCall) -> Mapping[str, Tensor]:
        """A block that runs; the last one renews the target.

        Only after the first evaluation is it known which block runs last, so there each takes the place of the one
        before.
        """
        streams = call.run(call.streams)
        is_new = len(state.trace.full) == 1
        if is_new:
            state.trace.blocks = state.block + 1
            state.target = {kind: TaylorState(self.order) for kind in streams}
        if state.block == state.trace.blocks - 1:
            for kind, series in state.target.items():
                update(series, streams[kind], float(state.evaluation))
        return streams


def relative_error(forecast: Tensor, output: Tensor, reduction: Literal["mean", "max"]) -> float:
    """mean |forecast - output| / mean |output| of tensors (B, ...): over all samples, or for the worst of them."""
    distance = (forecast - output).abs().flatten(1).mean(1, dtype=torch.float32)  # (B,)
    size = output.abs().flatten(1).mean(1, dtype=torch.float32)
    return (distance.mean() / size.mean() if reduction == "mean" else (distance / size).max()).item()
