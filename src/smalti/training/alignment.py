"""Alignment losses: terms on hidden states of a denoiser, added to its objective while it trains and gone afterwards.

    loss = objective + sum_i weight_i * alignment_i(tokens after tapped blocks, teacher features, ...)

`AlignedModel` runs the denoiser with taps on its blocks, computes all terms in the same forward and returns them beside
the velocity, so that projectors train with it in one process or several (DDP follows what a forward returns). The
denoiser itself stays what it was, and averaged and exported weights hold nothing else. Teacher features come with the
batch (`cond.extra`), cached once a sample, or from a live teacher. A term that is stopped (`training.stopping`) is gone
for good: its teacher is let go, its taps come off, and with the last one the model costs what the denoiser does.

Source: the form of REPA (arXiv 2410.06940, equation 8), which HASTE, SRA and VA-VAE share.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smalti.core.protocols import (
    Batch,
    Cond,
    Denoiser,
    Generators,
    LossResult,
    Objective,
    TensorBundle,
    TrainState,
)
from smalti.objectives.flow_matching import FlowMatching
from smalti.seams.taps import Taken, Taps
from smalti.training.data_order import SampleSource
from smalti.training.gradient_angle import gradient_cosine
from smalti.training.sample_draws import draw
from smalti.training.stopping import ANGLE


@dataclass(frozen=True)
class AlignmentCall:
    """What a term is computed from.

    Args:
        taken: image tokens and attention of the tapped blocks, with gradient, and their grid.
        x: the noisy sample (B, ...).
        t: its times.
        cond: conditioning, with teacher features or pixels in `extra`.
        state: step, averaged model.
        x0: the data that x was made of (B, ...); None outside of an objective.
        generator: one a sample, of which the objective has drawn already.
    """

    taken: Taken
    x: Tensor
    t: Tensor
    cond: Cond
    state: TrainState
    x0: Tensor | None = None
    generator: Generators = ()


class Alignment(nn.Module, ABC):
    """One term. Its parameters (projectors) are trained with the denoiser and left out of every export."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def depths(self) -> tuple[int, ...]:
        """Blocks whose image tokens it reads, counted from 1."""

    @property
    def attentions(self) -> tuple[int, ...]:
        """Blocks whose attention it reads."""
        return ()

    def open(self, denoiser: nn.Module) -> None:
        """Puts its own hooks on the denoiser, if it has any, as taps are put on."""

    def close(self) -> None:
        """Takes them off, as taps come off."""

    def release(self) -> None:
        """Lets go of teachers and the like, because it is never called again."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What identifies it, in json types."""

    @abstractmethod
    def forward(self, call: AlignmentCall) -> LossResult | None:
        """The weighted term and plain figures; None where it is switched off."""


@dataclass(frozen=True)
class AlignedOutput(TensorBundle):
    """The denoiser's velocity (B, ...), and the terms that are on: their losses () and figures () by name."""

    velocity: Tensor
    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]


class AlignedModel(nn.Module):
    """A denoiser with alignment terms: `(x, t, cond) -> AlignedOutput`.

    Args:
        denoiser: any transformer that `seams.anatomy` reads.
        terms: computed at every call; `state`, `x0` and `generator` are what they may know of the training.
    """

    def __init__(self, denoiser: nn.Module, terms: Sequence[Alignment]):
        super().__init__()
        self.denoiser = denoiser
        self.terms = nn.ModuleList(terms)
        self.state = TrainState()
        self.x0: Tensor | None = None
        self.generator: Generators = ()
        self.running: list[Alignment] = list(terms)
        self._taps: Taps | None = None

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of all terms."""
        return tuple(term.name for term in self.terms)  # type: ignore[misc]

    def stop(self, names: Sequence[str]) -> None:
        """Ends terms for good; their parameters stay, so that checkpoints look as before."""
        for term in [one for one in self.running if one.name in names]:
            term.release()
            self.running.remove(term)
        self.close()

    def tapped_parameters(self) -> list[nn.Parameter]:
        """Parameters of all blocks that are tapped; a call has to come before."""
        assert self._taps is not None
        depths = {depth for term in self.running for depth in (*term.depths, *term.attentions)}
        return [one for depth in sorted(depths) for one in self._taps.anatomy.blocks[depth - 1].module.parameters()]

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> AlignedOutput:
        if not self.running:
            return AlignedOutput(self.denoiser(x, t, cond), {}, {})
        if self._taps is None:  # not before: a copy of the denoiser that is made until then has no hooks
            self._open()  # type: ignore[reportCallIssue]  # what disables compilation is typed as a decorator
        velocity = self.denoiser(x, t, cond)
        assert self._taps is not None
        call = AlignmentCall(self._taps.taken, x, t, cond, self.state, self.x0, self.generator)
        found = {term.name: term(call) for term in self.running}
        results = {name: one for name, one in found.items() if one is not None}
        metrics = {name: torch.as_tensor(value) for one in results.values() for name, value in one.metrics.items()}
        return AlignedOutput(velocity, {name: one.loss for name, one in results.items()}, metrics)

    @torch.compiler.disable
    def _open(self) -> None:
        depths = [depth for term in self.running for depth in term.depths]
        self._taps = Taps(self.denoiser, depths, [depth for term in self.running for depth in term.attentions])
        for term in self.running:
            term.open(self.denoiser)

    def close(self) -> None:
        """Takes taps and hooks off the denoiser; the next call puts them on again."""
        if self._taps is not None:
            self._taps.remove()
            self._taps = None
            for term in self.terms:
                assert isinstance(term, Alignment)
                term.close()


@dataclass(frozen=True)
class AlignedObjective:
    """An objective with the terms of an `AlignedModel` added.

    Args:
        objective: of the denoiser.
        model: with the terms.
        angles: after each so many steps the cosine between the gradients of objective and terms is measured.
    """

    objective: Objective
    model: AlignedModel
    angles: tuple[int, ...] = ()

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """The objective's loss plus all terms, which are logged one by one."""
        self.model.state, self.model.x0, self.model.generator = state, batch.x0, generator
        outputs: list[AlignedOutput] = []

        def velocity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            outputs.append(denoiser(x, t, cond))  # type: ignore[arg-type]  # the denoiser of a training is the model
            return outputs[-1].velocity

        result = self.objective.loss(velocity, batch, state, generator)
        metrics: dict[str, float | Tensor] = {**result.metrics, "objective": result.loss.detach()}
        terms = [term for one in outputs for term in one.losses.values()]
        for one in outputs:
            metrics |= {name: term.detach() for name, term in one.losses.items()} | dict(one.metrics)
        if not terms:
            return LossResult(result.loss, metrics)
        aligned = torch.stack(terms).sum()
        if torch.is_grad_enabled() and any((state.step + 1) % every == 0 for every in self.angles):
            metrics[ANGLE] = gradient_cosine(result.loss, aligned, self.model.tapped_parameters())
        return LossResult(result.loss + aligned, metrics)


def denoiser_of(model: nn.Module) -> nn.Module:
    """The denoiser itself, of an aligned model or a plain one."""
    return model.denoiser if isinstance(model, AlignedModel) else model


@torch.no_grad()
def measure_terms(model: AlignedModel, source: SampleSource, seed: int = 0, batch: int = 64) -> dict[str, float]:
    """Mean of every figure of the terms over all samples of a source, at times of flow matching."""
    objective, device = AlignedObjective(FlowMatching(), model), next(model.parameters()).device
    model.train()
    sums: dict[str, float] = {}
    for indices in torch.arange(len(source)).split(batch):
        one = draw(source, indices, indices, seed, "held-out", device)
        for name, value in objective.loss(model, one.batch, TrainState(), one.generators).metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
    model.close()
    return {name: value / len(source) for name, value in sums.items()}


def teacher_features(call: AlignmentCall, name: str, teacher: nn.Module | None) -> Tensor:
    """Features (B, T, Dz) that came with the batch, or of a live teacher on the batch's pixels.

    Raises:
        ValueError: the batch holds neither.
    """
    if name in call.cond.extra:
        return call.cond.extra[name]
    if teacher is None or "pixels" not in call.cond.extra:
        raise ValueError(
            f"the batch holds no {name!r}, and {'no teacher' if teacher is None else 'no pixels for the live teacher'} "
            "is there; give the source cached features of this name, or a teacher and `pixels`"
        )
    with torch.no_grad():
        return teacher(call.cond.extra["pixels"])
