"""One arm of a claim on digits: a small denoiser of pixels, trained for a while, and how well it draws.

Pictures of 32 x 32 grey pixels in patches of 4 x 4 are 64 tokens, as many as those of `emoji_arm`; a class in place of
a caption. Within a thousand steps such a model draws digits that can be read, which no arm on emoji does.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.protocols import Cond, Objective
from smalti.core.seeds import generators_for, randn
from smalti.data.digits import CLASSES, load_digits
from smalti.evaluation.digit_metrics import DigitReport, digit_report
from smalti.objectives.flow_matching import FlowMatching
from smalti.sampling.guidance import Guidance
from smalti.sampling.loop import sample
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import Euler
from smalti.training.alignment import Alignment
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.latent_source import LatentSource
from smalti.training.trainer import Trainer

SHAPE = {"in_channels": 1, "patch_size": 4, "base_size": 8, "num_labels": CLASSES}
"""Settings of a backbone for these pictures; the label after the last class stands for none."""


@cache
def digits_source(split: str) -> LatentSource:
    """Digits of a split with their classes."""
    digits = load_digits(split)  # type: ignore[arg-type]
    views: Any = [digits.pixels()]
    return LatentSource(views, labels=digits.labels, dropped_label=CLASSES)


@dataclass(frozen=True)
class TrainedDigits:
    """What an arm ended with.

    Args:
        model: the averaged denoiser.
        held_out_loss: the objective on held-out digits.
        images_per_second: of the training.
    """

    model: nn.Module
    held_out_loss: float
    images_per_second: float

    @torch.no_grad()
    def draw(self, steps: int = 20, guidance: float = 1.0) -> Tensor:
        """A picture (1, 32, 32) for each held-out digit's class, (1000, 1, 32, 32); the seed is its index."""
        labels, parts = load_digits("held-out").labels, []
        for rows in torch.arange(len(labels)).split(250):
            noise = randn((len(rows), 1, 32, 32), generators_for(rows.tolist()))
            cond, uncond = (Cond(label=one) for one in (labels[rows], torch.full_like(rows, CLASSES)))
            parts.append(sample(
                self.model, noise, uniform_schedule(steps), Euler(), cond=cond, uncond=uncond,
                guidance=Guidance(guidance), progress=False,
            ).x)  # fmt: skip
        return torch.cat(parts)

    def report(self, steps: int = 20, guidance: float = 1.0) -> DigitReport:
        """How well it draws."""
        return digit_report(self.draw(steps, guidance))


def train_digits_arm(
    model: nn.Module,
    config: TrainConfig,
    *,
    objective: Objective | None = None,
    source: SampleSource | None = None,
    losses: Sequence[Alignment] = (),
) -> TrainedDigits:
    """Trains a denoiser of `SHAPE`.

    Args:
        model: changed in place.
        config: steps, batch, rates and seed; `eval_every` has to be set.
        objective: flow matching if None.
        source: samples instead of the training digits.
        losses: added to the objective.
    """
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        trainer = Trainer(
            model, objective or FlowMatching(), source or digits_source("train"), config, Path(folder),
            held_out=digits_source("held-out"), losses=losses,
        )  # fmt: skip
        report = trainer.fit()
    assert report.held_out_loss is not None, "eval_every is 0: an arm is measured on held-out digits"
    return TrainedDigits(trainer.ema_model.eval(), report.held_out_loss, report.images_per_second)
