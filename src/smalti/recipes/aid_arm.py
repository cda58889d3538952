"""One training with aids, under the protocol that all aids are compared by: `train_setup`.

Data, backbone, number of pictures and seeds are the same; rate, batch and EMA are tuned. What comes out is measured
at a quarter and at half of the pictures too, with the averaged weights of then.
"""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smalti.recipes.aid_data import DATA
from smalti.recipes.aids import FEATURES, Aids
from smalti.training.config import TrainConfig
from smalti.training.trainer import Trainer

QUARTERS = (1, 2)
"""Of the pictures, after which a training is measured on its way."""


@dataclass(frozen=True)
class Setup:
    """One training.

    Args:
        data: emoji or digits.
        aids: which.
        images: that are seen.
        batch, rate, ema: tuned.
        width, depth: of the backbone, with a mixer's block.
        is_trial: measured at the end alone.
    """

    data: str = "emoji"
    aids: Aids = field(default_factory=Aids)
    images: int = 19200
    batch: int = 32
    rate: float = 2e-3
    ema: float = 0.99
    width: int = 96
    depth: int = 6
    is_trial: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.images // self.batch

    def config(self, seed: int) -> TrainConfig:
        """Of its training; a tenth of the steps, at most 100, warms up."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate, warmup=min(100, self.steps // 10),
            decay="linear-cooldown", optimizer=self.aids.optimizer, ema=self.ema, seed=seed, save_every=10**6,
            log_every=100, eval_every=self.steps, eval_samples=1000, sample_every=self.steps // 4,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def train_setup(setup: Setup, seed: int) -> dict[str, float]:
    """Trains and measures.

    Args:
        setup: how.
        seed: of weights, order, noise and times.

    Returns:
        figures: `distance` and `right` at the end, and with ` at 1/4` and ` at 2/4` before it; `probe`,
        `held-out loss`, `images per second`, `seconds`.
    """
    torch.manual_seed(seed)
    data, width, config = DATA[setup.data](), 0, setup.config(seed)
    started = setup.aids.model(setup.width, setup.depth, **data.shape)
    objective = setup.aids.objective(setup.steps, data.shape["patch_size"])
    if setup.aids.teacher:
        data, width = data.with_features(setup.aids.teacher, FEATURES)
    found: dict[str, float] = {}

    def measure(averaged: nn.Module, step: int, folder: Path) -> None:
        quarter = round(4 * step / setup.steps)
        if step == setup.steps or (quarter in QUARTERS and not setup.is_trial):
            name = "" if step == setup.steps else f" at {quarter}/4"
            found.update({f"{key}{name}": value for key, value in data.measure(averaged.eval()).items()})

    losses = setup.aids.losses(setup.width, setup.depth, width, setup.steps)
    with tempfile.TemporaryDirectory(prefix="smalti-aid-") as folder:
        trainer = Trainer(
            started.model, objective, data.train, config, Path(folder),
            held_out=data.held_out, losses=losses, factors=started.factors, on_sample=measure,
            stops=setup.aids.stops(setup.steps),
        )  # fmt: skip
        report = trainer.fit()
    assert report.held_out_loss is not None
    depth = setup.depth // 2
    return found | {
        "probe": data.probe(trainer.ema_model.eval(), depth),
        "held-out loss": report.held_out_loss,
        "images per second": report.images_per_second,
        "seconds": setup.images / report.images_per_second,
    }
