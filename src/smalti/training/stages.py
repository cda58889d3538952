"""A training in stages, each with its own objective, data, rates and average, one after the other on the same weights.

A stage goes on from the trained weights of the one before, not from their average, and averages anew. Adam's moments
are kept or begin afresh. Every stage has a folder and a checkpoint of its own, so that a run that was stopped goes on
in the middle of a stage; stages that are done are read, not trained. No two stages see the same draws: the seed of
each is derived from its number. The report says what each stage cost.

Source: MicroDiT (arXiv 2407.15811), section 4.1: masked, then unmasked, at one resolution and at the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from smalti.core.errors import UserError
from smalti.core.protocols import Objective
from smalti.core.seeds import derive_seed
from smalti.evaluation.training_cost import TrainingCost, cost_table, sample_flops
from smalti.training.config import TrainConfig
from smalti.training.data_order import DataOrder, SampleSource
from smalti.training.sample_draws import draw
from smalti.training.trainer import Trainer, TrainReport


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: of its folder and of its line in the report.
        objective: what is learned, with its mask and noise levels.
        config: steps, batch, rates, average.
        source: samples; None = those of the stage before.
        moments: of the optimizer: kept from the stage before, or fresh.
        held_out: samples for its held-out loss; None = those of the stage before.
    """

    name: str
    objective: Objective
    config: TrainConfig
    source: SampleSource | None = None
    moments: Literal["kept", "fresh"] = "kept"
    held_out: SampleSource | None = None

    def __post_init__(self):
        if self.moments not in ("kept", "fresh"):
            raise UserError(f"stage {self.name!r} has moments {self.moments!r}; choose kept or fresh")


@dataclass(frozen=True)
class StagedReport:
    """How all stages went.

    Args:
        averaged: the averaged model of the last stage; the trained one if it averages nothing.
        reports: one a stage.
        costs: one a stage; the hours are those of this call.
    """

    averaged: nn.Module
    reports: tuple[TrainReport, ...]
    costs: tuple[TrainingCost, ...]

    @property
    def flops(self) -> float:
        """Of all stages together."""
        return sum(one.flops for one in self.costs)

    def table(self) -> str:
        """The costs as plain text."""
        return cost_table(self.costs)


def train_stages(
    model: nn.Module,
    stages: Sequence[Stage],
    out: Path | str,
    *,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> StagedReport:
    """Trains a model through all stages.

    Args:
        model: its weights are changed in place.
        stages: in their order, the first with a source; names differ.
        out: folder of the stages' folders.
        resume: go on where a run in this folder was stopped.
        say: told of every stage that ends.
        options: of `Trainer`, the same for all stages, such as `factors` or `description`.

    Raises:
        UserError: there is no stage, the first has no source, or two have one name; or what `Trainer.fit` raises.
    """
    names = [stage.name for stage in stages]
    if not stages or stages[0].source is None or len(set(names)) < len(names):
        raise UserError(f"got stages {names}; give at least one, different names, and a source to the first")
    source, held_out, trainer = stages[0].source, None, None
    reports, costs = [], []
    for number, stage in enumerate(stages):
        source, held_out = stage.source or source, stage.held_out or held_out
        config = stage.config
        if number:
            config = replace(config, seed=derive_seed(config.seed, "stage", number))
        moments = None if trainer is None or stage.moments == "fresh" else trainer.state.optimizers.flat_state()
        trainer = Trainer(
            model, stage.objective, source, config, Path(out) / f"{number + 1}-{stage.name}", held_out=held_out,
            **options,
        )  # fmt: skip
        if moments is not None:
            trainer.state.optimizers.load_flat_state(*moments)
        flops = _flops(trainer, source, config)
        report = trainer.fit(resume=resume)
        samples, devices = report.steps * config.batch, trainer.accelerator.num_processes
        hours = report.seconds / 3600 * devices
        costs.append(TrainingCost(stage.name, report.steps, samples, flops * samples, hours))
        reports.append(report)
        if say is not None:
            say(f"stage {stage.name}: {report.steps} steps, {costs[-1].flops:.3g} FLOP, {hours:.3g} hours")
    assert trainer is not None
    return StagedReport(trainer.ema_model, tuple(reports), tuple(costs))


def _flops(trainer: Trainer, source: SampleSource, config: TrainConfig) -> float:
    """FLOPs of one sample of the first step, in float32."""
    positions = torch.arange(min(2, config.batch))
    indices = DataOrder(source, config.batch, config.seed).indices(0)[: len(positions)]
    batch = draw(source, indices, positions, config.seed, "cost", trainer.accelerator.device).batch
    return sample_flops(trainer.state.model, trainer.train_step.objective, batch)
