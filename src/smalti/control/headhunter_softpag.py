"""Guidance by perturbing chosen attention heads.

Each guided step runs the model twice: plainly, and with the attention maps of chosen heads damaged. The prediction is
led away from the damaged one,

    eps_hat = eps + w (eps - eps_damaged),    for a head (l, h) of the set:  O = (1 - u) A V + u A' V

where A' is the identity by default, so that each token of the head keeps its own value, and u softens it. Which heads
are chosen decides what is gained: structure, a colour, a style (`head_hunt` finds them).

Classifier-free guidance of scale s multiplies what is added to its conditional branch, so that branch takes the share
w / s and the pipeline ends at `eps_u + s (eps_c - eps_u) + w (eps_c - eps_damaged)`. The unconditional branch is left
alone; where both are rows of one call, the damaged pass carries the unconditional rows along unused.

Source: Fine-Grained Perturbation Guidance via Attention Head Selection (arXiv 2506.10978), section 4 (heads) and
section 5 (SoftPAG). The other kinds of damage are those of `ops.head_damage`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from smalti.control.head_sets import HeadSet, read_heads_text
from smalti.core.errors import Refusal, UserError, unknown_name
from smalti.core.method import CoreCall, CoreMethod, Method, Moment, Outputs, Reading, StepCall, StepMethod
from smalti.core.protocols import TokenLayout
from smalti.ops.guidance_terms import guide_away
from smalti.ops.head_damage import BLENDS, Blend, check_kind, soften, soften_maps
from smalti.seams.heads import Address, is_self_attention, strengths
from smalti.seams.schedule import is_early, is_late

Heads = HeadSet | Mapping[Address, float] | Mapping[tuple[int, int], float] | str
TARGETS = ("joint", "image")
ROWS = ("auto", "all", "first half", "second half", "branch:NAME")


@dataclass
class Pass:
    """Whether the damaged pass is running, and what it has met.

    Args:
        is_damaged: whether it is.
        half: which half of the rows is guided; None = all.
        batch: rows of the attention, a multiple of those of the call where frames or tokens are attended to in turn.
        layers: where a head was damaged.
        kept: strengths of the heads as tensors, by layer and shape.
    """

    is_damaged: bool = False
    half: int | None = None
    batch: int = 0
    layers: set[int] = field(default_factory=set)
    kept: dict[tuple, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True)
class PerturbedHeads(StepMethod, CoreMethod):
    """Leads predictions away from those with damaged heads.

    Args:
        heads: strength u by (layer, head), a `HeadSet`, the path of a saved one, or words such as "L1H10+L2*0.5"; a
            head of None is the whole layer. A list holds one of these for each sample of the batch.
        scale: w; 0 = off.
        guidance: scale of the classifier-free guidance that the pipeline does; 1 = it does none (guidance-distilled
            models too). Nobody else knows it, so it has to be given.
        rows: which conditioning is guided. `auto`: all without classifier-free guidance; with it the branch that the
            pipeline calls cond, or the second half of the rows of one call [uncond, cond], as diffusers and smalti
            stack them. `branch:1` is the second of two unnamed calls a step.
        start, end: shares of the run's steps between which it acts.
        target: joint (text rows of a head are damaged as well) or image (these rows alone).
        kind: identity, uniform, mean query, temperature:T or zero.
        blend: linear, or by written-out maps log-linear or slerp, for small shapes.
        rescale: share in [0, 1] by which the spread of the guided prediction is set back to the plain one's.

    Raises:
        UserError: a value is out of range or unknown.
    """

    heads: Heads | Sequence[Heads] | None = None
    scale: float = 3.0
    guidance: float | None = None
    rows: str = "auto"
    start: float = 0.0
    end: float = 1.0
    target: str = "joint"
    kind: str = "identity"
    blend: Blend = "linear"
    rescale: float = 0.0

    order = -10  # outermost, so that what other methods make of attention is softened too
    owns = frozenset({"guidance by a damaged pass"})
    work = "more"

    def __post_init__(self):
        check_kind(self.kind)
        for name, allowed in (("target", TARGETS), ("blend", BLENDS)):
            if getattr(self, name) not in allowed:
                raise unknown_name(name, getattr(self, name), allowed)
        if self.rows not in ROWS[:4] and not (self.rows.startswith("branch:") and len(self.rows) > 7):
            raise unknown_name("choice of rows", self.rows, ROWS)
        if self.guidance is not None and self.guidance <= 0:
            raise UserError(f"got guidance={self.guidance}; give the pipeline's scale, 1 if it does not guide")
        if not 0 <= self.start < self.end <= 1 or not 0 <= self.rescale <= 1:
            raise UserError(
                f"got start={self.start}, end={self.end}, rescale={self.rescale}; give shares with start below end"
            )
        if self.kind == "zero" and self.blend != "linear":
            raise UserError(f"zeroed attention has no {self.blend} blend; choose blend='linear'")
        _ = self.sets

    @cached_property
    def sets(self) -> tuple[HeadSet, ...]:
        """The heads: one set for all samples, or one for each."""
        if self.heads is None:
            return ()
        is_one = isinstance(self.heads, (HeadSet, Mapping, str))
        return tuple(self._read(one) for one in ((self.heads,) if is_one else self.heads))  # type: ignore[arg-type]

    def _read(self, heads: Heads) -> HeadSet:
        if isinstance(heads, Mapping):
            return HeadSet(heads, self.kind, self.target)  # type: ignore[arg-type]
        if isinstance(heads, str) and not heads.endswith(".json"):
            return HeadSet(read_heads_text(heads), self.kind, self.target)
        found = HeadSet.load(Path(heads)) if isinstance(heads, str) else heads
        if (found.kind, found.target) != (self.kind, self.target):
            raise UserError(
                f"these heads were found with kind={found.kind!r}, target={found.target!r}, "
                f"got {self.kind!r}, {self.target!r}; give the ones that they were found with"
            )
        return found

    @classmethod
    def neutral(cls) -> Self:
        return cls({(0, 0): 1.0}, scale=0.0, guidance=1.0)

    @classmethod
    def active(cls) -> Self:
        return cls({(0, 0): 1.0}, scale=2.0, guidance=1.0)

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (
            cls({(0, None): 0.5}, guidance=1.0, target="image", kind="mean query", rescale=0.5),
            cls({(0, 1): 0.5}, guidance=1.0, blend="slerp"),
        )

    @property
    def is_neutral(self) -> bool:
        return self.scale == 0 or (bool(self.sets) and not any(any(one.heads.values()) for one in self.sets))

    def check(self, reading: Reading) -> None:
        if not self.sets and not self.is_neutral:
            raise Refusal("no heads are named; give heads={(layer, head): u}, or find some with hunt_heads")
        if self.guidance is None and not self.is_neutral:
            raise Refusal("the guidance of the pipeline is not known; give guidance=, its scale, or 1 if it has none")
        count = len({site.depth for site in reading.of_kind("block")})
        most = max((layer for one in self.sets for layer, _ in one.heads), default=0)
        if most >= count:
            raise Refusal(f"{reading.model} has {count} blocks, L0 to L{count - 1}; heads of L{most} were named")
        models = {one.model for one in self.sets} - {"", reading.model}
        if models:
            raise Refusal(f"these heads were found in {', '.join(models)}; {reading.model} has others: hunt there")

    def check_cores(self, model: str, cores: Mapping[str, tuple[TokenLayout, TokenLayout]]) -> None:
        if not any(is_self_attention(*layouts) for layouts in cores.values()):
            raise Refusal(
                f"{model} has no softmax attention of image tokens to their own sequence, and only there each token "
                "has a value of its own to keep"
            )

    def refuses(self, other: Method) -> str | None:
        if other.init() is not None and not isinstance(other, PerturbedHeads):
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
        if halves == 1 and len(self.sets) == 1:
            return
        counts = {len(one) for one in plain if isinstance(one, Tensor)}
        count = counts.pop()
        if counts or state.batch % count or count % halves:
            raise Refusal(
                f"predictions of {count} rows are no two halves of one guided call; if the branches are calls of their "
                "own, give rows='branch:1' for the second of a step, 'branch:0' if the condition comes first"
            )
        if len(self.sets) > 1 and count != halves * len(self.sets):
            raise Refusal(f"got heads for {len(self.sets)} samples and {count // halves} rows; give a set a sample")

    def _combine(self, plain: Tensor | None, damaged: Tensor | None, half: int | None) -> Tensor | None:
        if not isinstance(plain, Tensor) or not isinstance(damaged, Tensor):
            return plain
        assert self.guidance is not None
        guided = guide_away(plain, damaged, self.scale, self.rescale, self.guidance)
        if half is None:
            return guided
        return torch.cat([(guided if one == half else plain).chunk(2)[one] for one in (0, 1)])

    def at_core(self, state: Pass, call: CoreCall) -> Tensor:
        if not is_self_attention(call.layout, call.key_layout):
            return call.attend(call.q, call.k, call.v, call.mask)
        state.batch = call.q.shape[0]
        strength = self._strength(state, call) if state.is_damaged else None
        if strength is None:
            return call.attend(call.q, call.k, call.v, call.mask)
        target = _image_rows(call.layout, call.q.device) if self.target == "image" else None
        state.layers.add(call.site.depth)
        if self.blend == "linear":
            return soften(call.q, call.k, call.v, call.mask, strength, call.attend, self.kind, target)
        maps = soften_maps(call.q, call.k, call.v, call.mask, strength, call.scale, self.kind, target, self.blend)
        return torch.where(strength > 0, maps, call.attend(call.q, call.k, call.v, call.mask))

    def _strength(self, state: Pass, call: CoreCall) -> Tensor | None:
        """u of the heads at this attention, (1, h, 1, 1) or (B, h, 1, 1); None if all are 0."""
        layer, (batch, heads) = call.site.depth, call.q.shape[:2]
        key = (layer, batch, heads, call.q.device)
        if key not in state.kept:
            found = [strengths(one.heads, layer, heads) for one in self.sets]
            values = torch.stack([torch.zeros(heads) if one is None else one for one in found])  # (sets, h)
            if len(values) > 1:  # the unconditional half has the same heads, and nobody reads what it gives
                values = values if state.half is None else values.repeat(2, 1)
                values = values.repeat_interleave(batch // len(values), 0)
            state.kept[key] = values[:, :, None, None].to(call.q.device) if values.any() else None
        return state.kept[key]

    def _check_reached(self, state: Pass) -> None:
        named = {layer for one in self.sets for (layer, _), strength in one.heads.items() if strength}
        if named - state.layers:
            missed = ", ".join(f"L{layer}" for layer in sorted(named - state.layers))
            raise Refusal(
                f"{missed} has no softmax attention of image tokens to their own sequence; leave its heads out"
            )


@lru_cache(maxsize=64)
def _image_rows(layout: TokenLayout, device: torch.device) -> Tensor:
    """Which tokens are image (L, 1), bool."""
    return torch.cat([torch.full((one.length, 1), one.kind == "image", device=device) for one in layout.segments])
