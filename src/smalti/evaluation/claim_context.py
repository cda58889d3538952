"""What a claim is given: base models, seeds, device, a time budget, a scratch folder."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from smalti.core.errors import UserError
from smalti.data.packages import cache_folder
from smalti.zoo.loader import load_model

SEEDS = (0, 1, 2)
GPUS = ("h200", "h100", "b200", "a100")


@dataclass
class ClaimContext:
    """The surroundings of one claim.

    Args:
        slug: of the system.
        device: where to compute.
        seeds: for whatever is repeated.
        budget: factor on the work that a claim does by default; 2 for a second run.
        minutes: time after which a claim should come to its end.
        train: whether variants that ship are trained anew.
    """

    slug: str
    device: torch.device
    seeds: tuple[int, ...] = SEEDS
    budget: float = 1.0
    minutes: float = 15.0
    train: bool = False
    started: float = field(default_factory=time.monotonic)
    _models: dict[str, Any] = field(default_factory=dict)

    @property
    def hardware(self) -> str:
        """A short name of what it runs on: cpu, h200, ..."""
        return hardware_name(self.device)

    @property
    def scratch(self) -> Path:
        """A folder that stays between runs, so that trainings go on; part of the user's cache."""
        folder = cache_folder() / "claims" / f"{self.slug}-{self.budget:g}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def remaining(self) -> float:
        """Seconds left of the time budget."""
        return 60 * self.minutes * self.budget - (time.monotonic() - self.started)

    def model(self, name: str) -> Any:
        """A pipeline of the zoo on this device, without a progress bar."""
        if name not in self._models:
            pipe = load_model(name).to(self.device)
            pipe.set_progress_bar_config(disable=True)
            self._models[name] = pipe
        return self._models[name]

    def say(self, text: str) -> None:
        """Tells the user what is going on, on the error stream."""
        print(f"{self.slug}: {text}", file=sys.stderr, flush=True)


def hardware_name(device: torch.device) -> str:
    """cpu, or the GPU's short name."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu for gpu in GPUS if gpu in name), name.replace(" ", "-"))


def choose_device(is_full: bool) -> torch.device:
    """A GPU for full claims; small ones run on the CPU, which everybody has.

    Raises:
        UserError: a full claim is asked for and there is no GPU.
    """
    if not is_full:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("a full claim needs a CUDA GPU and none was found; leave --full out for the small claim")
    return torch.device("cuda")
