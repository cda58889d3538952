"""The processes that train together and the device of each: one Accelerator, set up the same way everywhere."""

import os
import shutil
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, is_tensorboard_available

from smalti.core.errors import UserError
from smalti.training.config import TrainConfig

PATIENCE = timedelta(hours=24)
"""How long a process waits for another one that reads, encodes or draws."""


def join_processes() -> PartialState:
    """The processes that were launched together; safe to call before `make_accelerator` does, and any number of times.

    Example:
        >>> with join_processes().main_process_first():  # the others find what the first one has written
        ...     source = make_cache()
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def make_accelerator(config: TrainConfig, out: Path) -> Accelerator:
    """The accelerator of this process; under `torchrun` or `accelerate launch` it joins the others (gloo on CPUs).

    Args:
        config: tracker, batch and accumulate.
        out: where trackers write.

    Raises:
        UserError: tracker or compiler are missing, the processes did not find each other, or the batch does not fit.
    """
    if config.tracker == "tensorboard" and not is_tensorboard_available():
        raise UserError("tracker is tensorboard, which is not installed; run: pip install 'smalti[tracking]'")
    if config.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise UserError(
            "compile is on, but there is no C++ compiler (g++, clang++ or $CXX); install one or leave it off"
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without this, launched CPU processes would not form a group
        mixed_precision="no",  # autocast is ours: only around the model, so that losses stay in float32
        log_with=config.tracker,
        project_dir=out,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                find_unused_parameters=True,  # embeddings of conditions that the samples do not have
            )
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched but this one sees {accelerator.num_processes}; "
            "create no Accelerator or PartialState before the Trainer but by join_processes()"
        )
    parts = accelerator.num_processes * config.accumulate
    if config.batch % parts:
        raise UserError(
            f"batch {config.batch} cannot be split over {accelerator.num_processes} processes with accumulate "
            f"{config.accumulate}; choose a multiple of {parts}"
        )
    return accelerator
