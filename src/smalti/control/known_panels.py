"""Panels that are given: the others are drawn around them, by any pipeline of flow matching.

At every step the given part of the sample is what a noising of the clean latents makes of it, with the same noise all
along: `z(t) = (1 - t) x0 + t eps`. Along this line the velocity is the constant `eps - x0`, so it is enough to answer
with it in place of the model there: every solver then stays on the line, both branches of guidance agree, and the
run ends at the clean latents themselves.

With `resample` the model looks again before each step: from its estimate D of the clean sample a new noisy one is
made, `(1 - t) D + t eps'` with fresh noise on what is to be drawn, and the estimate of that replaces D. New noise no
longer fights what is given, so the drawn panels agree better with it; each round costs one more evaluation.

Source: SDEdit-like replacement as In-Context LoRA (arXiv 2410.23775, section 3.4) proposes it for given panels;
RePaint (arXiv 2201.09865), algorithm 1. RePaint jumps back from the next time; here the jump goes through the estimate
at t = 0 and back, for which a method need not know the next time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from smalti.core.errors import Refusal, UserError
from smalti.core.method import Outputs, StepCall, StepMethod
from smalti.core.seeds import derive_seed
from smalti.ops.canvas import PanelLayout

TIMESTEPS = 1000.0
"""Largest time of models that do not count it from 0 to 1."""
OFF_LINE = 0.05
"""Share of the way from data to noise by which a given part may leave its line."""


@dataclass(frozen=True, eq=False)
class Given:
    """The clean latents of what is given.

    Args:
        values: in the form of the model's sample, of one sample or of B; only those where `mask` is True count.
        mask: which of them are given, broadcast to the values.
    """

    values: Tensor
    mask: Tensor

    def __repr__(self) -> str:
        shape = tuple(torch.broadcast_shapes(self.values.shape, self.mask.shape))
        return f"<{float(self.mask.float().mean()):.0%} of {shape}>"

    def packed(self, pack: Any) -> Self:
        """As a model takes it whose pipeline packs latents (B, C, H, W) into tokens: `pack` does that."""
        values = self.values
        mask = self.mask.expand_as(values).to(values.dtype)
        return replace(self, values=pack(values), mask=pack(mask) > 0.5)


def given_panels(layout: PanelLayout, panels: Mapping[int, Tensor], multiple: int = 1) -> Given:
    """Clean latents of some panels on their canvas.

    Args:
        layout: of the canvas.
        panels: latents (B, C, h, w) by panel.
        multiple: side of the model's patch.

    Raises:
        UserError: no panel is given or all are, or their shapes differ.
    """
    if not 0 < len(panels) < layout.count:
        raise UserError(f"got {len(panels)} of {layout.count} panels; give at least one and leave at least one out")
    some = next(iter(panels.values()))
    canvas = layout.assemble([panels.get(panel, torch.zeros_like(some)) for panel in range(layout.count)], multiple)
    height, width = canvas.shape[-2:]
    return Given(canvas, layout.mask(panels, height, width, multiple).expand(1, 1, -1, -1))


@dataclass
class Line:
    """The noise that the given part began with, the unit of the model's time, and the source of fresh noise."""

    noise: list[Tensor] = field(default_factory=list)
    unit: float = 1.0
    generator: torch.Generator = field(default_factory=torch.Generator)


@dataclass(frozen=True)
class KnownPanels(StepMethod):
    """Keeps what is given while the rest is drawn.

    Args:
        given: what is given; None = nothing.
        resample: rounds in which the model looks again before each step; 0 = plain replacement.
        seed: of the fresh noise of those rounds, alike for all branches of guidance.

    Raises:
        UserError: the rounds are no whole number from 0.

    Example:
        >>> known = KnownPanels(given_panels(PanelLayout(1, 2), {0: autoencoder.encode(left).tensor}))
        >>> with smalti.apply(pipe, known):
        ...     canvas = pipe(prompt, height=64, width=128).images[0]
    """

    given: Given | None = None
    resample: int = 0
    seed: int = 0

    order = 10  # innermost: what others make of a prediction must not move what is given
    owns = frozenset({"given parts of the sample"})
    work = "same"

    def __post_init__(self):
        if isinstance(self.resample, bool) or not isinstance(self.resample, int) or self.resample < 0:
            raise UserError(f"got resample={self.resample!r}; choose a whole number of rounds from 0")

    @classmethod
    def neutral(cls) -> Self:
        return cls()

    @classmethod
    def active(cls) -> Self:
        return cls(Given(torch.tensor(0.5), torch.tensor(True)))

    @property
    def is_neutral(self) -> bool:
        return self.given is None or not bool(self.given.mask.any())

    def init(self) -> Line:
        return Line()

    def at_step(self, state: Line, call: StepCall) -> Outputs:
        outputs = call.run()
        if self.is_neutral:
            return outputs
        samples = [call.sample] if isinstance(call.sample, Tensor) else list(call.sample)
        parts = [self._part(one, index) for index, one in enumerate(samples)]
        t = self._advance(state, call, samples, parts)
        for round_ in range(self.resample):
            denoised = [x - t * _velocity(v, x) for v, x in zip(outputs, samples)]
            generator = state.generator.manual_seed(derive_seed(self.seed, call.moment.evaluation, round_))
            renewed = [
                torch.where(mask, x, (1 - t) * d + t * _fresh(x, generator))
                for x, d, (_, mask) in zip(samples, denoised, parts)
            ]
            again = call.run(renewed[0] if isinstance(call.sample, Tensor) else renewed)
            # The estimate of the renewed sample, as a velocity at the sample that the solver holds.
            velocities = [(x - y) / t + _velocity(v, y) for v, x, y in zip(again, samples, renewed)]
            outputs = (*velocities, *again[len(samples) :])
            call.note("looked again")
        call.note("replaced")
        replaced = [
            torch.where(mask, noise.to(x.dtype) - values, _velocity(v, x))
            for v, x, noise, (values, mask) in zip(outputs, samples, state.noise, parts)
        ]
        return (*replaced, *outputs[len(samples) :])

    def _part(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Values and mask of what is given, of the shape of a sample."""
        assert self.given is not None
        found = []
        for one in (self.given.values, self.given.mask):
            if one.ndim == x.ndim + 1:  # the sample is one of a list
                one = one[index % len(one)]
            if one.ndim == x.ndim and 1 < len(one) < len(x) and len(x) % len(one) == 0:
                one = one.repeat(len(x) // len(one), *[1] * (x.ndim - 1))  # the branches of guidance in one call
            try:
                found.append(one.to(x.device).expand(x.shape))
            except RuntimeError:
                raise Refusal(
                    f"what is given has the shape {tuple(one.shape)}, the sample {tuple(x.shape)}; give latents of "
                    "the whole canvas, packed as the model takes them"
                ) from None
        return found[0].to(x.dtype), found[1]

    def _advance(self, state: Line, call: StepCall, samples: list[Tensor], parts: list[tuple[Tensor, Tensor]]) -> float:
        """The time in [0, 1]; at the first call the line is laid, at later ones the sample must lie on it."""
        if not state.noise:
            state.unit = TIMESTEPS if call.moment.t > 1 else 1.0
            t = call.moment.t / state.unit
            state.noise = [values + (x - values) / t for x, (values, _) in zip(samples, parts)]
            return t
        t = call.moment.t / state.unit
        for x, noise, (values, mask) in zip(samples, state.noise, parts):
            way = (noise - values)[mask].float()
            left = (x - values - t * (noise - values))[mask].float()
            if left.norm() > OFF_LINE * way.norm():
                raise Refusal(
                    "what is given has left its way from noise to data, so this model predicts no velocity of flow "
                    "matching, or its sampler adds noise; take a flow model with a deterministic scheduler"
                )
        return t


def _fresh(x: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of the shape of a sample, the same for all rows: branches of guidance must see one, batches not matter."""
    return torch.randn(x.shape[1:], generator=generator).to(x.device, x.dtype).expand(x.shape)


def _velocity(prediction: Tensor | None, x: Tensor) -> Tensor:
    """The prediction for a sample, which must have its shape."""
    if prediction is None or prediction.shape != x.shape:
        shape = None if prediction is None else tuple(prediction.shape)
        raise Refusal(
            f"the model predicts {shape} for a sample {tuple(x.shape)}: something beside a velocity; given panels need "
            "a model of flow matching"
        )
    return prediction
