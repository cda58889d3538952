"""What every stage promises to the others.

Time runs from 0 = data to 1 = noise: `xt = (1 - t) * x0 + t * noise`, `velocity = noise - x0`.
Shapes: B batch, C channels, F frames, H W height and width, N image tokens, M text tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
"""One source of randomness, or one for each sample of the batch."""


class TensorBundle:
    """Base of dataclasses of tensors that move, index and stack along the batch together."""

    def map(self, function) -> Self:
        """A copy with `function` applied to every tensor, also those inside mappings and other bundles."""

        def visit(value):
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, TensorBundle):
                return value.map(function)
            return {k: visit(v) for k, v in value.items()} if isinstance(value, Mapping) else value

        return replace(self, **{f.name: visit(getattr(self, f.name)) for f in fields(self)})  # type: ignore[type-var]

    def to(self, *args, **kwargs) -> Self:
        """A copy with every tensor moved; only floating-point tensors change dtype."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                return tensor.to(*args, **kwargs)
            device = kwargs.get("device", next((a for a in args if not isinstance(a, torch.dtype)), None))
            return tensor if device is None else tensor.to(device)

        return self.map(move)

    def __getitem__(self, index) -> Self:
        """The samples at `index` (a slice or an index tensor) along the batch."""
        return self.map(lambda tensor: tensor[index])

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Stack along the batch; all parts must hold the same fields."""

        def join(values):
            if isinstance(values[0], Tensor):
                return torch.cat(values)
            if isinstance(values[0], TensorBundle):
                return type(values[0]).cat(values)
            if isinstance(values[0], Mapping):
                return {k: join([v[k] for v in values]) for k in values[0]}
            return values[0]

        return cls(**{f.name: join([getattr(p, f.name) for p in parts]) for f in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cond(TensorBundle):
    """Everything a denoiser is conditioned on; what is None is absent.

    Args:
        text: token states of the prompt (B, M, D).
        pooled: one vector a prompt (B, D).
        mask: True where a text token is real (B, M).
        label: class or style index (B,), long.
        guidance: guidance scale given to a guidance-distilled model (B,).
        second_time: the other end of the interval for two-time models such as MeanFlow (B,), in [0, 1].
        extra: named tensors of a task, batch first.
    """

    text: Tensor | None = None
    pooled: Tensor | None = None
    mask: Tensor | None = None
    label: Tensor | None = None
    guidance: Tensor | None = None
    second_time: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TextEmbedding(TensorBundle):
    """Encoded prompts: tokens (B, M, D), pooled (B, D), mask (B, M) True = keep, segments (B, M) segment index."""

    tokens: Tensor
    pooled: Tensor
    mask: Tensor
    segments: Tensor


@dataclass(frozen=True)
class Latents(TensorBundle):
    """What a tokenizer's `encode` returns.

    Args:
        tensor: normalised latents (B, C, H, W) or (B, C, F, H, W), about zero mean and unit variance.
        indices: codes of a discrete tokenizer, long.
        mask: True where a latent is real.
        statistics: named tensors such as the unnormalised mean and log-variance of the posterior.
        extra: named tensors that `decode` may want back.
    """

    tensor: Tensor
    indices: Tensor | None = None
    mask: Tensor | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch(TensorBundle):
    """Training samples: x0 (B, ...), their conditioning, and ids (B,) long that name each sample draw."""

    x0: Tensor
    cond: Cond
    ids: Tensor


@dataclass(frozen=True)
class Segment:
    """One run of tokens that belong together.

    Args:
        kind: text, image, condition, reference or register.
        length: number of tokens.
        grid: (frames, height, width) if the tokens lie on a grid; their product is `length`.
        labels: position labels (length, axes) before rotation.
        time: time of these tokens if it differs from the call's.
        adapter: name of the adapter that serves them.
    """

    kind: str
    length: int
    grid: tuple[int, int, int] | None = None
    labels: Tensor | None = None
    time: Tensor | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class TokenLayout:
    """The segments of a sequence in the order in which they stand."""

    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return sum(segment.length for segment in self.segments)

    def span(self, kind: str) -> slice:
        """Where the first segment of this kind lies."""
        start = 0
        for segment in self.segments:
            if segment.kind == kind:
                return slice(start, start + segment.length)
            start += segment.length
        raise KeyError(f"no {kind!r} segment among {[s.kind for s in self.segments]}")


@dataclass(frozen=True)
class LossResult:
    """A loss to minimise (scalar tensor) and plain floats for the log."""

    loss: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainState:
    """What an objective may know of the training: step, the EMA model, teachers by name."""

    step: int = 0
    ema: Any = None
    teachers: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Denoiser(Protocol):
    """Predicts the velocity; t has shape (B,), (B, F) or (B, N)."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor: ...


@runtime_checkable
class Generator(Protocol):
    """Draws samples without being a denoiser."""

    def sample(self, cond: Cond, shape: Sequence[int], generator: Generators) -> Tensor: ...


@runtime_checkable
class Tokenizer(Protocol):
    """Pixels in [-1, 1] to normalised latents and back."""

    def encode(self, pixels: Tensor) -> Latents: ...

    def decode(self, latents: Latents, *, generator: Generators | None = None, **context) -> Tensor: ...


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts, or lists of prompt segments, to token states."""

    def encode(self, prompts: list[str] | list[list[str]]) -> TextEmbedding: ...


@runtime_checkable
class Objective(Protocol):
    """What is learned."""

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult: ...


@runtime_checkable
class Mixer(Protocol):
    """A token mixer as an attention core: q, k, v (B, h, N, d) -> (B, h, N, d)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor: ...


@dataclass(frozen=True)
class SolverState(TensorBundle):
    """Where a solver stands: the sample, and what it remembers of earlier steps by name."""

    x: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Solver(Protocol):
    """A pure step from time t to time s; `denoiser(x, t)` has its conditioning bound already."""

    def step(self, state: SolverState, denoiser, t: float, s: float, noise: Tensor | None = None) -> SolverState: ...
