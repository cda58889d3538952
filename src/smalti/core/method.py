"""What a training-free method is, and what it receives at each seam.

A method is a frozen dataclass of hyperparameters. It inherits from the class of every seam at which it acts:

- `StepMethod`: the whole denoiser call;
- `BlockMethod`: one transformer block with its token streams;
- `SublayerMethod`: the output of attention or feed-forward inside a block, before its gate;
- `CoreMethod`: q, k, v of one attention after norm and rotation;
- `TokensMethod` (in `core.tokens`): the whole denoiser call, of which it may leave out image tokens.

What it remembers is a separate object, made by `init` for every run, lane, branch and model and handed back at each
call. Methods know nothing of models or pipelines; `smalti.seams` calls them.

Shapes: B batch, N image tokens, M text tokens, L tokens of a sequence, D width, h heads, d head_dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from smalti.core.protocols import TokenLayout

Outputs = tuple[Tensor | None, ...]
"""What a sublayer or a model returns: its tensors in the order of the model; a stream that is absent is None."""
Work = Literal["less", "same", "more"]


@dataclass(frozen=True)
class Moment:
    """Where in a run a call happens.

    Args:
        step: index of the time in this run.
        evaluation: index of the model evaluation in this run; a second-order solver has two in most steps, the
            branches of guidance share one.
        t: time in the model's own units.
        steps: planned number of steps, where the pipeline says it.
        lane: name of the lane; "main" if none was given.
        branch: name of the conditioning branch, from the pipeline or by order of appearance.
    """

    step: int
    evaluation: int
    t: float
    steps: int | None = None
    lane: str = "main"
    branch: str = "0"


@dataclass(frozen=True)
class Site:
    """A place in the model.

    Args:
        stack: path of the list of blocks, such as "transformer_blocks".
        index: of the block in its stack.
        name: path of the sublayer inside the block; "" for the block.
        kind: block, attention, ffn, or fused (one projection closes attention and feed-forward side by side).
        depth: index of the block over all stacks, in the order in which they run.
        occurrence: index of this call of the site within one evaluation.
    """

    stack: str
    index: int
    name: str
    kind: Literal["block", "attention", "ffn", "fused"]
    depth: int
    occurrence: int = 0

    def __str__(self) -> str:
        return f"{self.stack}.{self.index}" + (f".{self.name}" if self.name else "")


Note = Callable[[str], None]
"""Counts an event for the report; a method that notes nothing in a whole run never engaged."""


@dataclass(frozen=True)
class StepCall:
    """The whole denoiser call; `run()` computes its predictions, in most models one tensor (B, ...).

    `sample` is the noisy sample (B, ...), or a list of samples as some models take it; `run(other)` computes the
    predictions of another sample of the same form in its place.
    """

    moment: Moment
    sample: Any
    run: Callable[..., Outputs]
    note: Note


@dataclass(frozen=True)
class BlockCall:
    """One block; `streams` holds its tokens by kind ("image" (B, N, D), "text" (B, M, D), "joint" (B, L, D)).

    `run(streams)` computes the block on the given streams and returns streams of the same kinds.
    """

    moment: Moment
    site: Site
    streams: Mapping[str, Tensor]
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    note: Note


@dataclass(frozen=True)
class SublayerCall:
    """One sublayer of one block."""

    moment: Moment
    site: Site
    note: Note


@dataclass(frozen=True)
class CoreCall:
    """One scaled-dot-product attention.

    Args:
        moment: where in the run.
        site: the attention it belongs to.
        q: queries (B, h, L, d) after norm and rotation.
        k: keys (B, h, L', d).
        v: values (B, h, L', d).
        mask: what the model passed: bool (True = attend) or an additive bias, broadcast to (B, h, L, L'), or None.
        scale: factor on the scores, None = 1 / sqrt(d).
        layout: segments of the queries.
        key_layout: segments of the keys.
        attend: `attend(q, k, v, mask)`, the model's own attention (or the next method's).
        note: counts an event.
    """

    moment: Moment
    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    layout: TokenLayout
    key_layout: TokenLayout
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    note: Note


@dataclass(frozen=True)
class Reading:
    """What was read from a model before anything runs; a method refuses here what it cannot act on.

    Args:
        model: class name.
        sites: blocks and sublayers in the order in which they stand.
    """

    model: str
    sites: tuple[Site, ...]

    def of_kind(self, *kinds: str) -> tuple[Site, ...]:
        """The sites of these kinds."""
        return tuple(site for site in self.sites if site.kind in kinds)


class Method(ABC):
    """A training-free method; concrete ones are frozen dataclasses.

    Class attributes:
        order: of several methods at one seam the one with the smallest number is outermost.
        owns: what only one method at a time can decide, such as "sublayer outputs"; two that own the same are refused.
        work: what its active setting does to the counted FLOPs.
        supports_grad: whether gradients may flow through it.
    """

    order: ClassVar[int] = 0
    owns: ClassVar[frozenset[str]] = frozenset()
    work: ClassVar[Work] = "same"
    supports_grad: ClassVar[bool] = False

    def __str__(self) -> str:
        """The name and what differs from its defaults."""
        values = {one.name: (getattr(self, one.name), one.default) for one in fields(self)}  # type: ignore[arg-type]
        changed = (f"{name}={value!r}" for name, (value, default) in values.items() if value != default)
        return f"{type(self).__name__}({', '.join(changed)})"

    @classmethod
    @abstractmethod
    def neutral(cls) -> Self:
        """A setting under which every result is the plain model's, bit for bit."""

    @classmethod
    @abstractmethod
    def active(cls) -> Self:
        """A setting that acts on small models within a run of twelve steps."""

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        """Further settings like `active` that work in another way."""
        return ()

    @classmethod
    def candidates(cls, steps: int, speedup: float) -> "tuple[Method, ...]":
        """Settings that a planner tries, the likeliest first; by default none, and planners leave the method out.

        Args:
            steps: evaluations of a run.
            speedup: how many times faster it is to be.
        """
        return ()

    @property
    @abstractmethod
    def is_neutral(self) -> bool:
        """Whether this setting asks for nothing, so that never engaging is no fault."""

    def init(self) -> Any:
        """What the method remembers within one run, lane, branch and model; None = nothing."""
        return None

    def check(self, reading: Reading) -> None:
        """Raises `Refusal` if the method cannot act on this model; by default it can act on all."""
        return

    def refuses(self, other: "Method") -> str | None:
        """Why this method cannot act beside another, or None."""
        shared = self.owns & other.owns
        return f"both decide {', '.join(sorted(shared))}" if shared else None

    def idle_reason(self, evaluations: int) -> str:
        """What a user should change after a run of so many evaluations in which nothing was engaged."""
        return f"nothing was engaged in {evaluations} evaluations"

    def kept(self, state: Any) -> int:
        """Bytes of tensors that the state holds."""
        return 0


class Bundle(ABC):
    """Methods that go together on one model and setting, such as a plan; `smalti.apply` takes it in their place."""

    @abstractmethod
    def methods_for(self, target: Any) -> "tuple[Method, ...]":
        """The methods; raises `Refusal` if they are not for this pipeline or model."""

    @abstractmethod
    def check_run(self, moment: Moment, sample: tuple[int, ...]) -> None:
        """Raises `Refusal` if a run that begins, with a sample of this shape, is not what they are for."""


class StepMethod(Method):
    """Acts on the whole denoiser call."""

    @abstractmethod
    def at_step(self, state: Any, call: StepCall) -> Outputs:
        """The predictions: `call.run()`, changed or forgone."""


class BlockMethod(Method):
    """Acts on whole blocks."""

    @abstractmethod
    def at_block(self, state: Any, call: BlockCall) -> Mapping[str, Tensor]:
        """The block's streams: `call.run(call.streams)`, changed or forgone."""


class SublayerMethod(Method):
    """Acts on outputs of sublayers. The decision comes first, so that nothing of a skipped sublayer is computed."""

    @abstractmethod
    def skips(self, state: Any, call: SublayerCall) -> bool:
        """Whether `forecast` gives the output and the sublayer does not run."""

    @abstractmethod
    def forecast(self, state: Any, call: SublayerCall) -> Outputs:
        """The output of a sublayer that does not run."""

    @abstractmethod
    def observe(self, state: Any, call: SublayerCall, outputs: Outputs) -> Outputs:
        """Sees the output of a sublayer that ran; what it returns is used."""


class CoreMethod(Method):
    """Acts on attention cores."""

    def check_cores(self, model: str, cores: Mapping[str, tuple[TokenLayout, TokenLayout]]) -> None:
        """Raises `Refusal` if no attention suits the method; by default any does.

        Args:
            model: class name.
            cores: layouts of queries and keys of every softmax attention, by stack and name, at the current shapes.
        """
        return

    @abstractmethod
    def at_core(self, state: Any, call: CoreCall) -> Tensor:
        """The attention's output (B, h, L, d): `call.attend(...)`, changed or forgone."""
