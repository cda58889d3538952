"""A toy training in a process of its own: `python run_toy.py OUT key=json ...`, alone or under torchrun."""

import json
import os
import resource
import sys
from pathlib import Path

import torch
from toy_training import DIM, PlanesSource, ToyDenoiser, ToySource

from smalti.backbones.dit import DiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.objectives.flow_matching import FlowMatching
from smalti.training.alignment import Alignment
from smalti.training.config import TrainConfig
from smalti.training.repa import REPA, REPASettings, TeacherPort
from smalti.training.sra import SelfAlignment, SRASettings
from smalti.training.stopping import StopAt, StopOnConflict
from smalti.training.trainer import Trainer, TrainReport

torch.set_num_threads(1)


def train(out: Path, **settings) -> TrainReport:
    """Trains or resumes; settings of model and source are taken out, the rest makes the `TrainConfig`."""
    model = {key: settings.pop(key) for key in ("dropout", "width", "unused") if key in settings}
    source = {key: settings.pop(key) for key in ("broken", "delay", "count") if key in settings}
    until, is_own = settings.pop("aligned_until", None), settings.pop("is_own", False)
    torch.manual_seed(0)
    config = TrainConfig(**{"steps": 50, "batch": 16, "log_every": 1, **settings})
    if until is None:
        held_out = ToySource(count=24) if config.eval_every else None
        trainer = Trainer(
            ToyDenoiser(**model), FlowMatching(), ToySource(**source), config, out, held_out=held_out, on_sample=sample
        )
    else:
        term: Alignment = REPA(16, [TeacherPort("teacher", DIM)], REPASettings(depth=1, hidden=16))
        if is_own:
            term = SelfAlignment(16, SRASettings(student=1, teacher=2))
        rule = StopAt((term.name,), until) if until else StopOnConflict((term.name,), 1.1, checks=3, every=4)
        trainer = Trainer(DiT.tiny(), FlowMatching(), PlanesSource(), config, out, losses=[term], stops=[rule])
    return trainer.fit(resume=True)


def sample(model: torch.nn.Module, step: int, folder: Path) -> None:
    """Draws nothing, but calls the model, which one process alone must be able to do."""
    x = torch.ones(1, 1, 2, 2)
    torch.save(model(x, torch.ones(1), Cond(label=torch.tensor([0]))), folder / f"{step}.pt")


def run(out: Path, settings: dict, environment: dict[str, str], largest_file: int | None = None) -> None:
    """Entry of a started process: as the command line does, a `UserError` is one line and status 2."""
    os.environ.update(environment)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        train(out, **settings)
    except UserError as error:
        (out / f"error.{os.environ.get('RANK', '0')}").write_text(str(error))
        sys.exit(2)


if __name__ == "__main__":
    run(Path(sys.argv[1]), {key: json.loads(value) for key, value in (a.split("=", 1) for a in sys.argv[2:])}, {})
