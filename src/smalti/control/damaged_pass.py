"""A second pass of the model with something damaged, from which the plain prediction is led away.

    eps_hat = eps + w (eps - eps_damaged)

Classifier-free guidance of scale s multiplies what is added to its conditional branch, so that branch takes the share
w / s and the pipeline ends at `eps_u + s (eps_c - eps_u) + w (eps_c - eps_damaged)`. The unconditional branch is left
alone; where both are rows of one call, the damaged pass carries the unconditional rows along unused.

What is damaged is the matter of those who inherit: chosen heads, or whole layers.

Source: PAG (arXiv 2403.17377), equation 13; Fine-Grained Perturbation Guidance (arXiv 2506.10978), section 3.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from smalti.core.errors import Refusal, UserError, unknown_name
from smalti.core.method import Method, Moment, Outputs, Reading, StepCall, StepMethod
from smalti.ops.guidance_terms import guide_away
from smalti.seams.heads import Address
from smalti.seams.schedule import is_early, is_late

ROWS = ("auto", "all", "first half", "second half", "branch:NAME")


@dataclass
class Pass:
    """Whether the damaged pass is running, and what it has met.

    Args:
        is_damaged: whether it is.
        half: which half of the rows is guided; None = all.
        batch: rows of the attention, a multiple of those of the call where frames or tokens are attended to in turn.
        layers: where something was damaged.
        kept: strengths of the heads as tensors, by layer and shape.
    """

    is_damaged: bool = False
    half: int | None = None
    batch: int = 0
    layers: set[int] = field(default_factory=set)
    kept: dict[tuple, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DamagedPass(StepMethod):
    """Runs every guided call twice, the second time with `state.is_damaged`, and combines both.

    Args:
        scale: w; 0 = off.
        guidance: scale of the classifier-free guidance that the pipeline does; 1 = it does none (guidance-distilled
            models too). Nobody else knows it, so it has to be given.
        rows: which conditioning is guided. `auto`: all without classifier-free guidance; with it the branch that the
            pipeline calls cond, or the second half of the rows of one call [uncond, cond], as diffusers and smalti
            stack them. `branch:1` is the second of two unnamed calls a step.
        start, end: shares of the run's steps between which it acts.
        rescale: share in [0, 1] by which the spread of the guided prediction is set back to the plain one's.

    Raises:
        UserError: a value is out of range or unknown.
    """

    scale: float = 3.0
    guidance: float | None = None
    rows: str = "auto"
    start: float = 0.0
    end: float = 1.0
    rescale: float = 0.0

    order = -10  # outermost, so that what other methods make of attention is softened too
    owns = frozenset({"guidance by a damaged pass"})
    work = "more"
    _missing: ClassVar[str]
    """What is said of a named layer in which nothing could be damaged."""

    def __post_init__(self):
        if self.rows not in ROWS[:4] and not (self.rows.startswith("branch:") and len(self.rows) > 7):
            raise unknown_name("choice of rows", self.rows, ROWS)
        if self.guidance is not None and self.guidance <= 0:
            raise UserError(f"got guidance={self.guidance}; give the pipeline's scale, 1 if it does not guide")
        if not 0 <= self.start < self.end <= 1 or not 0 <= self.rescale <= 1:
            raise UserError(
                f"got start={self.start}, end={self.end}, rescale={self.rescale}; give shares with start below end"
            )

    @property
    @abstractmethod
    def damage(self) -> tuple[Mapping[Address, float], ...]:
        """What is damaged and how strongly, for all samples or for each."""

    @property
    def is_neutral(self) -> bool:
        return self.scale == 0 or (bool(self.damage) and not any(any(one.values()) for one in self.damage))

    def check(self, reading: Reading) -> None:
        if self.guidance is None and not self.is_neutral:
            raise Refusal("the guidance of the pipeline is not known; give guidance=, its scale, or 1 if it has none")
        count = len({site.depth for site in reading.of_kind("block")})
        most = max((layer for one in self.damage for layer, _ in one), default=0)
        if most >= count:
            raise Refusal(f"{reading.model} has {count} blocks, L0 to L{count - 1}; L{most} was named")

    def refuses(self, other: Method) -> str | None:
        if other.init() is not None and not isinstance(other, DamagedPass):
            return (
                f"{type(other).__name__} remembers every evaluation, and the damaged pass would be one more, which it "
                "cannot tell from the plain one"
            )
        return super().refuses(other)

    def idle_reason(self, evaluations: int) -> str:
        return (
            f"in {evaluations} evaluations no step lay between {self.start:g} and {self.end:g} of the run, or no call "
            f"belonged to rows={self.rows!r}"
        )

    def init(self) -> Pass:
        return Pass()

    def at_step(self, state: Pass, call: StepCall) -> Outputs:
        if not self._acts(call.moment):
            return call.run()
        plain = call.run()
        state.half = self._half(call.moment.branch)
        self._check_rows(plain, state)
        state.is_damaged = True
        try:
            damaged = call.run()
        finally:
            state.is_damaged = False
        self._check_reached(state)
        call.note("guided")
        return tuple(self._combine(one, other, state.half) for one, other in zip(plain, damaged, strict=True))

    def _acts(self, moment: Moment) -> bool:
        """Whether a call is guided."""
        if self.is_neutral or is_early(moment, self.start) or is_late(moment, 1 - self.end):
            return False
        branch = moment.branch
        if self.rows.startswith("branch:"):
            return branch == self.rows.removeprefix("branch:")
        if self.rows != "auto" or branch in ("0", "cond", "cond_uncond"):
            return True
        if branch == "uncond" and self.guidance != 1:
            return False
        raise Refusal(
            f"the model is called for several branches (now {branch!r}), so which one is guided has to be said: "
            "guidance=SCALE, rows='branch:1' for the second of two unnamed calls a step, or 'all' for every call"
        )

    def _half(self, branch: str) -> int | None:
        """Which half of the rows is guided; None = all."""
        if "half" in self.rows:
            return 0 if self.rows == "first half" else 1
        return 1 if self.rows == "auto" and self.guidance != 1 and branch != "cond" else None

    def _check_rows(self, plain: Outputs, state: Pass) -> None:
        """Whether rows can be told apart where that is needed: the first axis of every prediction counts samples."""
        halves = 1 if state.half is None else 2
        if halves == 1 and len(self.damage) == 1:
            return
        counts = {len(one) for one in plain if isinstance(one, Tensor)}
        count = counts.pop()
        if counts or state.batch % count or count % halves:
            raise Refusal(
                f"predictions of {count} rows are no two halves of one guided call; if the branches are calls of their "
                "own, give rows='branch:1' for the second of a step, 'branch:0' if the condition comes first"
            )
        if len(self.damage) > 1 and count != halves * len(self.damage):
            raise Refusal(f"got heads for {len(self.damage)} samples and {count // halves} rows; give a set a sample")

    def _combine(self, plain: Tensor | None, damaged: Tensor | None, half: int | None) -> Tensor | None:
        if not isinstance(plain, Tensor) or not isinstance(damaged, Tensor):
            return plain
        assert self.guidance is not None
        guided = guide_away(plain, damaged, self.scale, self.rescale, self.guidance)
        if half is None:
            return guided
        return torch.cat([(guided if one == half else plain).chunk(2)[one] for one in (0, 1)])

    def _check_reached(self, state: Pass) -> None:
        named = {layer for one in self.damage for (layer, _), strength in one.items() if strength}
        if named - state.layers:
            missed = ", ".join(f"L{layer}" for layer in sorted(named - state.layers))
            raise Refusal(f"{missed} {self._missing}")
