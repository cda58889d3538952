"""TaylorSeer: most steps forecast what attention and feed-forward would give instead of running them.

After `warmup` full evaluations one in `interval` is full; there the output of every sublayer, before its gate, renews a
Taylor series over the index of the evaluation. In between no sublayer runs: its series gives the output, while norms,
modulation and gates follow the current time. `lite` keeps one series for the output of the whole model instead, at
1 / (2 * blocks) of the memory and with more error. `order` 0 is plain reuse. In place of a fixed interval the full
evaluations can be named: early ones, where the curve bends, want to be closer together than late ones.

Source: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers (arXiv 2503.06923), section 3.
Differences from the published code: our own counter, which rises with every evaluation; named full evaluations, exact
divided differences and the time as abscissa are options.
"""

from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.method import Moment, Outputs, StepCall, StepMethod, SublayerCall, SublayerMethod
from smalti.ops.taylor import TaylorState, kept_bytes, predict, update
from smalti.seams.schedule import is_late

STORES = {"model": None, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Memory:
    """What TaylorSeer remembers in one run and branch.

    Args:
        series: one a tensor, by site (or "model") and place in the output; None for outputs that are no tensors.
        evaluations: seen so far.
        forecasts: since the last full evaluation.
        is_full: whether the current evaluation is full.
        place: abscissa of the current evaluation.
        is_derived: whether derivatives are renewed now.
    """

    series: dict[str, tuple[TaylorState | None, ...]] = field(default_factory=dict)
    evaluations: int = 0
    forecasts: int = 0
    is_full: bool = True
    place: float = 0.0
    is_derived: bool = True


@dataclass(frozen=True)
class TaylorSeer(StepMethod, SublayerMethod):
    """Forecasts sublayers (or, `lite`, the whole prediction) between full evaluations.

    Args:
        interval: N in the paper: one full evaluation in so many; 1 forecasts nothing.
        order: O in the paper: highest derivative; 0 repeats, 1 is the safe choice, 2 pays from about 30 steps on.
        warmup: full evaluations at the beginning, at least 1.
        last_full: so many steps at the end are full; needs a pipeline, or `handle.run(steps=...)`.
        lite: one series for the model's output.
        store: dtype of the factors: model, fp32 or bf16.
        offload: factors wait in the CPU's memory.
        differences: published (all orders share the newest distance) or divided (exact on irregular places).
        abscissa: evaluation (its index) or time.
        full_at: indices of the evaluations that are full, from 0 on, in place of interval and warmup.

    Raises:
        UserError: a value is out of range.
    """

    interval: int = 4
    order: int = 1
    warmup: int = 3
    last_full: int = 0
    lite: bool = False
    store: Literal["model", "fp32", "bf16"] = "model"
    offload: bool = False
    differences: Literal["published", "divided"] = "published"
    abscissa: Literal["evaluation", "time"] = "evaluation"
    full_at: tuple[int, ...] = ()

    owns = frozenset({"sublayer outputs"})
    work = "less"

    def __post_init__(self):
        for name, low in (("interval", 1), ("order", 0), ("warmup", 1), ("last_full", 0)):
            if getattr(self, name) < low:
                raise UserError(f"TaylorSeer got {name}={getattr(self, name)}; give a whole number from {low}")
        for name, allowed in (
            ("store", STORES), ("differences", ("published", "divided")), ("abscissa", ("evaluation", "time")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise unknown_name(f"{name} of TaylorSeer", getattr(self, name), allowed)
        if self.full_at and (self.full_at[0] != 0 or list(self.full_at) != sorted(set(self.full_at))):
            raise UserError(f"TaylorSeer got full_at={self.full_at}; give rising indices, the first of them 0")
        if self.full_at and (self.interval, self.warmup) != (4, 3):
            raise UserError("TaylorSeer got full_at, which stands in place of interval and warmup; leave these out")

    @classmethod
    def neutral(cls) -> Self:
        return cls(interval=1)

    @classmethod
    def active(cls) -> Self:
        return cls(interval=3, order=1, warmup=2)

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (
            cls(interval=3, order=2, warmup=2, lite=True),
            cls(interval=3, order=2, warmup=2, differences="divided", abscissa="time", store="fp32", offload=True),
            cls(full_at=(0, 1, 3, 6, 10)),
        )

    @classmethod
    def candidates(cls, steps: int, speedup: float) -> "tuple[Self, ...]":
        full = steps / speedup
        counts = dict.fromkeys(round(count) for count in (full - 0.1 * (steps - full), full, full - 1))
        named = [
            cls(order=order, lite=lite, full_at=spread_places(count, steps, bend))
            for lite in (False, True)
            for count in counts
            for bend in (1.3, 1.0, 1.6)
            for order in (1, 2)
            if 2 < count < steps
        ]
        interval = max(2, round((steps - 3) / max(1.0, full - 3)))
        return (*named, cls(interval=interval, order=1), cls(interval=interval, order=1, lite=True))

    @property
    def is_neutral(self) -> bool:
        return self.interval == 1 and not self.full_at

    def idle_reason(self, evaluations: int) -> str:
        if self.full_at:
            return f"all of {evaluations} evaluations are named in full_at={self.full_at}; name fewer"
        return (
            f"of {evaluations} evaluations the first {self.warmup} are warm-up, then one in {self.interval} is full, "
            f"and so are the last {self.last_full} steps; take more steps or a shorter warm-up"
        )

    def init(self) -> Memory:
        return Memory()

    def kept(self, state: Memory) -> int:
        return sum(kept_bytes(one) for series in state.series.values() for one in series if one is not None)

    def at_step(self, state: Memory, call: StepCall) -> Outputs:
        self._decide(state, call.moment)
        if not self.lite:
            return call.run()
        if not state.is_full:
            call.note("forecast")
            return self._predict(state, "model")
        return self._update(state, "model", call.run())

    def skips(self, state: Memory, call: SublayerCall) -> bool:
        return not self.lite and not state.is_full

    def forecast(self, state: Memory, call: SublayerCall) -> Outputs:
        call.note("forecast")
        return self._predict(state, _key(call))

    def observe(self, state: Memory, call: SublayerCall, outputs: Outputs) -> Outputs:
        return outputs if self.lite or self.is_neutral else self._update(state, _key(call), outputs)

    def _decide(self, state: Memory, moment: Moment) -> None:
        """Whether the evaluation that begins is full; warm-up counts from this state's first one."""
        if self.full_at:
            state.is_full, state.is_derived = state.evaluations in self.full_at, True
        else:
            state.is_full = state.evaluations < self.warmup or state.forecasts == self.interval - 1
            # The differences of the first warm-up evaluations are thrown away: the curve still bends too much there.
            state.is_derived = state.evaluations > self.warmup - 2
        state.is_full |= is_late(moment, self.last_full)
        state.place = float(moment.evaluation) if self.abscissa == "evaluation" else moment.t
        state.forecasts = 0 if state.is_full else state.forecasts + 1
        state.evaluations += 1

    def _update(self, state: Memory, key: str, outputs: Outputs) -> Outputs:
        if key not in state.series:
            state.series[key] = tuple(self._series() if isinstance(one, Tensor) else None for one in outputs)
        for series, value in zip(state.series[key], outputs, strict=True):
            if series is not None and value is not None:
                update(series, value, state.place, state.is_derived)
        return outputs

    def _predict(self, state: Memory, key: str) -> Outputs:
        return tuple(None if one is None else predict(one, state.place) for one in state.series[key])

    def _series(self) -> TaylorState:
        return TaylorState(self.order, self.differences == "divided", STORES[self.store], self.offload)


def spread_places(count: int, steps: int, bend: float) -> tuple[int, ...]:
    """So many of the indices 0 to steps - 1, the first and the last among them: (i / (count - 1)) ** bend of the way.

    With a bend above 1 the early ones are the closest.
    """
    places = [0]
    for i in range(1, count):
        wanted = round((i / (count - 1)) ** bend * (steps - 1))
        places.append(min(max(wanted, places[-1] + 1), steps - count + i))
    return tuple(places)


def _key(call: SublayerCall) -> str:
    return f"{call.site}#{call.site.occurrence}"
