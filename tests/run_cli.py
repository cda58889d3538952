"""The command line in a process of its own, started by the fixture `start_cli`."""

import os
import resource
import sys
from pathlib import Path

import torch

import smalti.recipes.folder
import smalti.tasks.text_to_image  # noqa: F401  (imported once, by the server that all processes come from)
from smalti.cli import main
from smalti.recipes import folder_autoencoder

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def run(arguments: list[str], log: str, environment: dict[str, str], largest_file: int | None) -> None:
    """Entry of the process: output goes to `log`.out, errors to `log`.err; no file may become larger than given.

    `TEST_SHIPPED` in the environment stands in for the autoencoder that ships.
    """
    torch.set_num_threads(1)
    os.environ.update(ENVIRONMENT | environment)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    for stream, suffix in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        os.dup2(os.open(f"{log}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream.fileno())
    if "TEST_SHIPPED" in environment:
        folder_autoencoder.SHIPPED = Path(environment["TEST_SHIPPED"])
    sys.argv = ["smalti", *arguments]
    main()
