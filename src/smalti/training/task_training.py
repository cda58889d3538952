"""Trainings of the tasks of a bank: all at once, each batch mixing them, or one after the other.

The model is frozen either way, so a task that is trained later changes nothing of an earlier one.

Source: Diffscaler (arXiv 2404.09976), section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Objective
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.shared_base import TASK
from smalti.training.task_bank import TaskBank
from smalti.training.trainer import Trainer, TrainReport


class JointSource:
    """Samples of several tasks, each task equally often; every batch names them in `cond.extra["task"]`.

    Args:
        sources: of each task, in the order of the set; smaller ones are seen more often. All give conditions with the
            same fields and shapes.
    """

    def __init__(self, sources: Sequence[SampleSource]):
        if any(getattr(source, "groups", None) is not None for source in sources):
            raise UserError("samples of several shapes cannot be mixed; train one task after the other")
        self.sources = list(sources)

    def __len__(self) -> int:
        return len(self.sources) * max(len(source) for source in self.sources)

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """The samples at `indices` (B,) long."""
        task, inner = indices % len(self.sources), indices // len(self.sources)
        parts, places = [], []
        for number, source in enumerate(self.sources):
            place = (task == number).nonzero()[:, 0]
            if len(place):
                parts.append(source.batch(inner[place] % len(source), [generators[i] for i in place.tolist()]))
                places.append(place)
        mixed = Batch.cat(parts)[torch.cat(places).argsort()]
        extra = {**mixed.cond.extra, TASK: task}
        return replace(mixed, cond=replace(mixed.cond, extra=extra), ids=indices)


def train_together(
    bank: TaskBank, sources: Mapping[str, SampleSource], objective: Objective, config: TrainConfig, out: Path | str
) -> TrainReport:
    """Trains tasks of a bank at once and puts their averages into it.

    Args:
        bank: has the tasks.
        sources: samples of each task.
        objective: what is learned.
        config: of the one training; its batch is shared by the tasks.
        out: its folder.
    """
    tasks = bank.train(*sources)
    source = next(iter(sources.values())) if len(sources) == 1 else JointSource(list(sources.values()))
    trainer = Trainer(tasks, objective, source, config, out, factors=bank.factors())
    report = trainer.fit()
    bank.put(trainer.ema_model)
    return report


def train_in_turn(
    bank: TaskBank, sources: Mapping[str, SampleSource], objective: Objective, config: TrainConfig, out: Path | str
) -> dict[str, TrainReport]:
    """Trains tasks of a bank one after the other, each in a folder of its own; see `train_together`."""
    return {
        name: train_together(bank, {name: source}, objective, config, Path(out) / name)
        for name, source in sources.items()
    }
