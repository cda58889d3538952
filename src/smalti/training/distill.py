"""Distillation: a student learns to predict what its frozen teacher predicts, and to attend as that attends.

    loss = sum_i weight_i * mean over samples of w(t) * term_i

    fm    |v_student - (noise - x0)|^2          the objective itself
    pred  |v_student - v_teacher|^2             on the same noisy sample
    attn  |a_student - a_teacher|^2             raw attention outputs of tapped blocks, mean over blocks

The student is the teacher's copy with methods on its attention cores, or any other model with the same sites: what
trains is chosen by name, the rest stays shared. It goes through `Trainer`, with its average, checkpoints and resume.

Source: CLEAR (arXiv 2412.16112), section 3.4 and equation 5; LinFusion (arXiv 2409.02097) for the form.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError, unknown_name
from smalti.core.method import Method
from smalti.core.protocols import Batch, Cond, Denoiser, Generators, LossResult, TrainState
from smalti.objectives.flow_matching import FlowMatching
from smalti.seams.core_taps import CoreTaps, Tapped
from smalti.training.attention_deltas import attention_parameters
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.sample_draws import draw
from smalti.training.trainer import Trainer
from smalti.zoo.loader import weights_hash

LOSSES = ("fm", "pred", "attn")


@dataclass(frozen=True)
class Distillation:
    """The objective of a student.

    Args:
        teacher: frozen, with the student's taps.
        losses: weights by name: fm, pred, attn.
        objective: path, times and w(t).

    Raises:
        UserError: an unknown loss, a weight below 0, or `attn` without taps.
    """

    teacher: CoreTaps
    losses: Mapping[str, float]
    objective: FlowMatching

    def __post_init__(self):
        for name, weight in self.losses.items():
            if name not in LOSSES:
                raise unknown_name("distillation loss", name, LOSSES)
            if weight < 0:
                raise UserError(f"got a weight of {weight} for {name}; give at least 0")
        if self.losses.get("attn") and not self.teacher.sites:
            raise UserError(
                "the loss attn compares tapped attentions, and there are no taps; give some, as single[::4]"
            )

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """The weighted sum; all three terms are logged."""
        pairs: list[tuple[Tapped, Tapped]] = []

        def velocity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            student: Any = denoiser(x, t, cond)
            with torch.no_grad():
                pairs.append((student, self.teacher(x, t, cond)))
            return student.velocity

        error, t = self.objective.errors(velocity, batch, generator)
        ((student, teacher),) = pairs
        terms = {"fm": error, "pred": distance(student.velocity, teacher.velocity)}
        if self.teacher.sites:
            apart = [distance(student.attended[site], teacher.attended[site]) for site in self.teacher.sites]
            terms["attn"] = torch.stack(apart).mean(0)
        weight = 1.0 if self.objective.weight is None else self.objective.weight(t)
        means = {name: (weight * one).mean() for name, one in terms.items()}
        loss = sum((self.losses.get(name, 0.0) * one for name, one in means.items()), torch.zeros_like(error[0]))
        return LossResult(loss, {name: one.detach() for name, one in means.items()})


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of each sample (B,), in float32."""
    return (one.float() - other.float()).square().flatten(1).mean(1)


def make_student(teacher: nn.Module, methods: Sequence[Method], taps: str = "") -> CoreTaps:
    """A copy of the teacher with methods; only attention projections and the methods' own weights train."""
    denoiser = copy.deepcopy(teacher).requires_grad_(False)
    for parameter in attention_parameters(denoiser).values():
        parameter.requires_grad_(True)
    student = CoreTaps(denoiser, methods, taps)
    student.parts.requires_grad_(True)
    return student


def distill(
    student: CoreTaps,
    teacher: nn.Module,
    data: SampleSource,
    config: TrainConfig,
    out: Path | str,
    *,
    losses: Mapping[str, float] | None = None,
    taps: str = "",
    objective: FlowMatching | None = None,
    held_out: SampleSource | None = None,
    description: Mapping[str, Any] | None = None,
) -> Trainer:
    """The trainer of a student; `fit()` trains, and `ema_model` is the averaged student.

    Args:
        student: of `make_student`, or another model in `CoreTaps` whose sites have the teacher's names.
        teacher: frozen; it is put into evaluation mode.
        data: samples, best drawn by the teacher itself (`training.self_generated`).
        config: of the training.
        out: folder of log and checkpoints.
        losses: weights by name; None = fm 1, pred 0.5, attn 0.5.
        taps: attentions that are compared, such as "single_blocks[::4]", in student and teacher.
        objective: path, times and w(t).
        held_out: samples for the held-out loss.
        description: facts that identify the training.

    Raises:
        UserError: nothing of the student trains, its taps differ from the teacher's, or a loss is unknown.

    Example:
        >>> student = make_student(teacher, [CLEAR(radius=3)], "single_blocks[::4]")
        >>> trainer = distill(student, teacher, data, TrainConfig(400, 16, 1e-4), out, taps="single_blocks[::4]")
        >>> trainer.fit()
    """
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError("no parameter of the student trains; make it with make_student, or set requires_grad")
    frozen = CoreTaps(teacher.requires_grad_(False).eval(), taps=taps)
    if student.sites != frozen.sites:
        raise UserError(f"student and teacher are tapped at {student.sites} and {frozen.sites}; give the same taps")
    chosen = {"fm": 1.0, "pred": 0.5, "attn": 0.5 if taps else 0.0} if losses is None else dict(losses)
    facts = {"teacher": weights_hash(teacher), "methods": [str(one) for one in student.methods], "taps": taps}
    task = Distillation(frozen, chosen, objective or FlowMatching())
    return Trainer(student, task, data, config, out, held_out=held_out, description={**facts, **(description or {})})


@torch.no_grad()
def prediction_errors(
    student: CoreTaps, teacher: nn.Module, data: SampleSource, seed: int = 0, batch: int = 32
) -> list[float]:
    """Mean squared difference of student's and teacher's velocity for each sample of a source.

    Args:
        student: with its methods.
        teacher: with none.
        data: samples, best ones that were never trained on.
        seed: of noise and times, which are those of flow matching.
        batch: samples at once.
    """
    errors: list[float] = []
    device = next(teacher.parameters()).device
    for indices in torch.arange(len(data)).split(batch):
        one = draw(data, indices, indices, seed, "held-out", device)

        def compare(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            taught = teacher(x, t, cond)
            errors.extend(distance(student(x, t, cond).velocity, taught).tolist())
            return taught

        FlowMatching().errors(compare, one.batch, one.generators)
    return errors
