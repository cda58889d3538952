"""What a training tells while it runs: a bar on the error stream, a log of json lines, a tracker."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from smalti.core.errors import UserError
from smalti.core.files import atomic_file
from smalti.training.config import TrainConfig
from smalti.training.train_step import Outcome

TORN = sys.maxsize
"""Stands for the step of a line that a kill has torn."""


class Journal:
    """Averages the numbers of the steps and writes them down; silent on all processes but the main one.

    Args:
        accelerator: has the trackers.
        config: how often.
        out: folder of `log.jsonl`.
        start: steps that are done already; what the log says of later ones is dropped.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, out: Path, start: int):
        self.accelerator, self.config, self.start = accelerator, config, start
        self.loss, self.held_out_loss = float("nan"), None
        self._path, self._is_main = out / "log.jsonl", accelerator.is_main_process
        self._losses: list[float] = []
        self._seconds, self._steps = 0.0, 0
        self.busy = 0.0
        if self._is_main:
            truncate_log(self._path, start)
        if config.tracker:
            known = {key: value for key, value in asdict(config).items() if isinstance(value, (int, float, str))}
            accelerator.init_trackers("tracker", known)
        pace = 0.5 if sys.stderr.isatty() else 20.0  # into a file, seldom
        self._bar = tqdm(
            total=config.steps, initial=start, unit="step", file=sys.stderr, disable=not self._is_main, mininterval=pace
        )

    def note(self, step: int, outcome: Outcome, seconds: float, rate: float, skipped: int) -> None:
        """Counts a finished step; every `log_every` steps writes the means since the last line."""
        self.busy += seconds
        self._seconds += seconds
        self._steps += 1
        if outcome.is_finite:
            self._losses.append(outcome.loss)
        self._bar.update(1)
        if step % self.config.log_every and step != self.config.steps:
            return
        speed = self._steps * self.config.batch / self._seconds
        line: dict[str, float | int] = {"step": step, "rate": rate, "images_per_second": speed, "skipped": skipped}
        if self._losses:
            self.loss = sum(self._losses) / len(self._losses)
            line |= {"loss": self.loss}
        if outcome.is_finite:
            line |= {"norm": outcome.norm, **{key: float(value) for key, value in outcome.metrics.items()}}
        self._bar.set_postfix_str(f"{speed:.1f} img/s, loss {self.loss:.4f}", refresh=False)
        self._write(line)
        self._losses, self._seconds, self._steps = [], 0.0, 0

    def note_held_out(self, step: int, loss: float) -> None:
        """Writes the held-out loss of the averaged weights, on a line of its own."""
        self.held_out_loss = loss
        self._write({"step": step, "held_out_loss": loss})

    def close(self) -> None:
        """Ends the bar and the trackers."""
        self._bar.close()
        for tracker in self.accelerator.trackers:  # not end_training, which would end the process group as well
            tracker.finish()

    def _write(self, numbers: Mapping[str, float | int]) -> None:
        if not self._is_main:
            return
        rounded = {key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in numbers.items()}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; free some space, then resume") from error
        if self.config.tracker:
            self.accelerator.log(
                {key: value for key, value in rounded.items() if key != "step"}, step=int(numbers["step"])
            )


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log as dictionaries, oldest first; a line torn by a kill is left out."""
    return [json.loads(line) for line in _lines(path) if _step(line) < TORN]


def truncate_log(path: Path, step: int) -> None:
    """Drops the lines after `step`: they belong to work that will be done again."""
    kept = [line for line in _lines(path) if _step(line) <= step] if step and path.exists() else []
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return TORN
