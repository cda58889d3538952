"""What a training on a folder costs on this machine, and how its loss falls at first: measured in about a minute.

Some of the pictures are encoded; models of growing width take a few steps each; then the chosen one trains for a while.
Nothing is written outside a folder that is thrown away.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from smalti.core.protocols import TrainState
from smalti.data.folder import FolderSet
from smalti.evaluation.emoji_metrics import spread
from smalti.recipes.folder import FolderRecipe, Started, start_transformer, teacher_of
from smalti.recipes.folder_autoencoder import Autoencoder
from smalti.recipes.folder_guide import WIDTHS, Choice, Machine, is_worth_it, recipe_for
from smalti.recipes.folder_source import latent_sources, split_pictures
from smalti.recipes.folder_teacher import Teacher
from smalti.training.alignment import AlignedModel, AlignedObjective
from smalti.training.autoencoder import reconstruction_psnr
from smalti.training.data_order import DataOrder
from smalti.training.latent_source import LatentSource
from smalti.training.optimizers import Optimizers
from smalti.training.progress import read_log
from smalti.training.sample_draws import draw
from smalti.training.trainer import Trainer

MOST, JUDGED = 512, 8
TIMED, BATCH = 3, 16
STEP_OVER_PASS = 3.5
"""Training on a picture, over encoding and decoding it once."""
STEPS_DRAWN, SHEET, CHECKED, EVALUATED = 28, 16, 32, 256
LAST_CHECK = 8.0
"""Seconds of reading features of drawn and training pictures at the end."""


@dataclass(frozen=True)
class Prepared:
    """Some pictures of a folder, ready to be trained on.

    Args:
        pictures: the few.
        source: their latents.
        teacher: whose features come with them.
        share: how many pictures of the folder each stands for.
        seconds: that their latents and captions took.
        psnr: of the autoencoder on them, in dB.
        pass_seconds: encoding and decoding one.
    """

    pictures: FolderSet
    source: LatentSource
    teacher: Teacher | None
    share: float
    seconds: float
    psnr: float
    pass_seconds: float


@dataclass(frozen=True)
class Curve:
    """How a trial went: pictures seen, losses there, and seconds an image."""

    images: list[float]
    losses: list[float]
    seconds: float


def prepare(recipe: FolderRecipe, pictures: FolderSet, base: Autoencoder, folder: Path) -> Prepared:
    """Encodes some pictures, evenly spread, and times it."""
    few = pictures.take(spread(len(pictures), MOST))
    started = time.perf_counter()
    psnr = reconstruction_psnr(base, few, spread(len(few), JUDGED))
    passed = (time.perf_counter() - started) / min(JUDGED, len(few))
    started = time.perf_counter()
    teacher = teacher_of(recipe, base)
    source = latent_sources(base, few, split_pictures(few), recipe.text_length, folder, teacher=teacher).train
    return Prepared(few, source, teacher, len(pictures) / len(few), time.perf_counter() - started, psnr, passed)


def autoencoder_steps(recipe: FolderRecipe, prepared: Prepared, seconds: float) -> int:
    """Steps of the autoencoder's training within so many seconds; 0 where it needs none."""
    if recipe.tokenizer is not None or prepared.psnr >= recipe.enough:
        return 0
    config = recipe.autoencoder_training
    return min(config.steps, int(seconds / (STEP_OVER_PASS * prepared.pass_seconds * config.batch)))


def measure(
    recipe: FolderRecipe, prepared: Prepared, base: Autoencoder, seconds: float, besides: float,
    say: Callable[[str], None],
) -> Machine:  # fmt: skip
    """Times models of growing width until they are too large for a training of so many seconds.

    Args:
        recipe: of the folder.
        prepared: what they are timed on.
        base: the autoencoder.
        seconds: that are left for the training, at most.
        besides: seconds that all but the training and its pictures will take.
        say: told of every width.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    costs, weights, tokens = {}, {}, 0.0
    has_text = prepared.pictures.captions is not None
    for width in WIDTHS:
        choice = Choice(width, BATCH, 100, recipe.training.learning_rate, seconds)
        one = recipe_for(recipe, choice, device, has_text)
        started = start_transformer(one, base, prepared.pictures)
        weights[width] = sum(parameter.numel() for parameter in started.model.parameters())
        costs[width], tokens = _seconds_an_image(one, started, prepared, device)
        say(f"width {width}: {weights[width] / 1e6:.1f} M weights, {1 / costs[width]:.0f} images/s")
        if not is_worth_it(seconds / costs[width] * tokens, weights[width]):
            break
    after = (2 * SHEET + CHECKED) * STEPS_DRAWN * 2 / 3 + 16 * EVALUATED / 3
    return Machine(device, costs, weights, tokens, besides + LAST_CHECK, after)


def _seconds_an_image(recipe: FolderRecipe, begun: Started, prepared: Prepared, device: str) -> tuple[float, float]:
    """Of a training step, the first one left out; and the tokens of a picture."""
    model: Any = begun.model
    objective, source, losses = recipe.objective, prepared.source, begun.losses(prepared.teacher)
    if losses:
        model = AlignedModel(model, losses)
        objective = AlignedObjective(objective, model)
    model.to(device)
    optimizers, order = Optimizers(model.train(), recipe.training), DataOrder(source, BATCH, 0)
    started, tokens = 0.0, 0.0
    for step in range(TIMED + 1):
        if step == 1:
            started = time.perf_counter()
        one = draw(source, order.indices(step), order.positions(step), 0, "trial", torch.device(device))
        tokens = one.batch.x0[0, 0].numel() / begun.model.patch_size**2
        with torch.autocast(device, torch.bfloat16, enabled=recipe.training.precision == "bf16"):
            loss = objective.loss(model, one.batch, TrainState(step), one.generators).loss
        loss.backward()
        optimizers.step(step)
        optimizers.zero_grad()
        loss.item()  # waits for the device
    return (time.perf_counter() - started) / (TIMED * BATCH), tokens


def trial(recipe: FolderRecipe, prepared: Prepared, base: Autoencoder, seconds: float, folder: Path) -> Curve:
    """Trains what was chosen for so many seconds, at its peak rate."""
    started = start_transformer(recipe, base, prepared.pictures)
    config = replace(
        recipe.training, decay="constant", minutes=seconds / 60, sample_every=0, eval_every=0, patience=0,
        log_every=1, save_every=recipe.training.steps,
    )  # fmt: skip
    trainer = Trainer(
        started.model, recipe.objective, prepared.source, config, folder, factors=started.factors,
        losses=started.losses(prepared.teacher),
    )  # fmt: skip
    report = trainer.fit()
    lines = [line for line in read_log(report.curve) if "loss" in line]
    losses = [line.get("objective", line["loss"]) for line in lines]  # without what a teacher adds
    return Curve([line["step"] * config.batch for line in lines], losses, 1 / report.images_per_second)
