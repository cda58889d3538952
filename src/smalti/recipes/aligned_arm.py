"""One arm of a claim on emoji about losses beside the objective: what is measured on the way, and what ends them.

As in `emoji_arm`, a small denoiser learns cached latents, 64 tokens, and is judged on held-out concepts. Here it is
measured on the way too, losses may stop by a rule, pictures come along for a teacher that is not cached, and the log is
kept.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from smalti.backbones.dit import DiT
from smalti.data.emoji import STYLES, EmojiSet
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji_arm import CHANNELS, GRID, TEXT_LENGTH, TEXT_WIDTH, Trained, stock
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.training.alignment import Alignment
from smalti.training.config import TrainConfig
from smalti.training.latent_source import LatentSource
from smalti.training.progress import read_log
from smalti.training.stopping import StopRule
from smalti.training.trainer import Trainer

WIDTH, DEPTH, BATCH = 96, 6, 32


@dataclass(frozen=True)
class PictureTable:
    """Pictures (B, 3, 64, 64) in [-1, 1] by index, as a source's table."""

    pictures: EmojiSet

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.pictures.pixels(indices)


@dataclass(frozen=True)
class AlignedArm:
    """What an arm ended with.

    Args:
        trained: the averaged model and its held-out loss.
        distances: of the averaged model to held-out pictures, after so many steps on the way.
        log: lines of the training.
    """

    trained: Trained
    distances: Mapping[int, float]
    log: Sequence[Mapping[str, float]]

    def curve(self, name: str) -> list[float]:
        """All logged values of a figure."""
        return [line[name] for line in self.log if name in line]


def arm_model(seed: int) -> DiT:
    """The denoiser of all arms, drawn from a seed."""
    torch.manual_seed(seed)
    return DiT(
        in_channels=CHANNELS, patch_size=1, depth=DEPTH, heads=WIDTH // 32, head_dim=32, num_labels=len(STYLES),
        pooled_dim=TEXT_WIDTH, base_size=GRID[0],
    )  # fmt: skip


def arm_config(steps: int, seed: int) -> TrainConfig:
    """The training of all arms."""
    return TrainConfig(
        steps=steps, batch=BATCH, learning_rate=2e-3, warmup=min(50, steps // 4), decay="linear-cooldown", ema=0.99,
        seed=seed, eval_every=steps, eval_samples=698,
    )  # fmt: skip


def with_pictures() -> LatentSource:
    """The training samples with their pictures, in `cond.extra["pixels"]`."""
    shared = stock()
    table: Any = PictureTable(shared.train_pictures)
    return replace(shared.train, features={"pixels": [table]})


def train_aligned_arm(
    config: TrainConfig,
    losses: Sequence[Alignment] = (),
    stops: Sequence[StopRule] = (),
    source: LatentSource | None = None,
    marks: Sequence[int] = (),
    count: int = 200,
) -> AlignedArm:
    """Trains an arm.

    Args:
        config: of `arm_config`.
        losses: beside flow matching.
        stops: rules that end them.
        source: samples instead of the stock's.
        marks: steps, evenly spaced from the first on, after which distances are measured.
        count: pictures of these distances.
    """
    shared, distances = stock(), dict[int, float]()

    def measure(model: Any, step: int, folder: Path) -> None:
        if step in marks:
            distances[step] = _trained(model).distance(count, guidance=1.0)

    every = min(marks, default=0)
    assert all(mark % every == 0 for mark in marks), f"marks {marks} are not evenly spaced from the first on"
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        trainer = Trainer(
            arm_model(config.seed), FlowMatching(), source or shared.train, replace(config, sample_every=every), folder,
            held_out=shared.held_out, losses=losses, stops=stops, on_sample=measure,
        )  # fmt: skip
        report = trainer.fit()
        log = read_log(report.curve)
    assert report.held_out_loss is not None
    averaged: Any = trainer.ema_model
    done = replace(_trained(averaged), held_out_loss=report.held_out_loss, images_per_second=report.images_per_second)
    return AlignedArm(done, distances, log)


def _trained(model: ModelMixin) -> Trained:
    """A model that can draw."""
    shared = stock()
    pipe = TextToImagePipeline(
        model.eval(), shared.autoencoder, make_scheduler("euler"), text_length=TEXT_LENGTH, styles=list(STYLES)
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.use_text_encoder(shared.encoder)
    return Trained(pipe, float("nan"), float("nan"))
