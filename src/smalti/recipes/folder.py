"""A model of one's own from a folder of pictures: captions, labels of sub-folders, or neither.

The autoencoder that ships is measured on the pictures first and trained on them only where it falls short. Captions
train a joint-attention transformer, labels (or nothing) a plain diffusion transformer; the patch grows with the
size, so that a square picture has at most 16 x 16 tokens. From 200 pictures on, one in twenty is held out.
Several processes train together; the first of them reads, writes and talks.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.files import atomic_file
from smalti.data.folder import FolderSet, load_folder
from smalti.evaluation.emoji_metrics import spread
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.folder_autoencoder import Autoencoder, base_autoencoder, fitted_autoencoder
from smalti.recipes.folder_model import build_pipeline, build_transformer, patch_size
from smalti.recipes.folder_samples import memorising, sample_sheet
from smalti.recipes.folder_source import latent_sources, split_pictures
from smalti.recipes.folder_teacher import Teacher
from smalti.training.config import TrainConfig
from smalti.training.messages import is_main, say
from smalti.training.mup import MuP
from smalti.training.optimizers import Factors
from smalti.training.processes import join_processes
from smalti.training.progress import read_log
from smalti.training.repa import REPA
from smalti.training.run_folder import check_run, open_run
from smalti.training.run_state import plain
from smalti.training.trainer import Trainer
from smalti.zoo.loader import save_model, settings_hash, weights_hash

SAMPLES = 16
FEW = 1000
RISE = 1.01
"""So many times the lowest held-out loss is overfitting."""
TEXT_LENGTHS = range(4, 513)


@dataclass(frozen=True)
class FolderRecipe:
    """Everything that decides the model.

    Args:
        training: the transformer's training.
        transformer: arguments of `MMDiT` (captions) or `DiT` (labels, nothing); the rest follows from the pictures.
        data: the folder.
        size: side of the square pictures, 64 to 512; others go to buckets of about this area.
        tokenizer: folder of any autoencoder, taken as it is; none = the one that ships.
        enough: PSNR in dB from which the autoencoder that ships is not trained further.
        autoencoder_training: its training where it falls short.
        text_length: tokens of a prompt, 4 to 512.
        objective: path, times and weights of the loss.
        guidance: default guidance scale of the pipeline, from 0.
        shift: pixels by which pictures are also seen moved, in four directions; 0 = only as they are.
        cluster: where pictures are encoded: empty for this process, or ray.
        workers: of the cluster.
        tuned_width: width at which the rate was tuned; muP carries it to the transformer's. None: the rate is its own.
        teacher: a vision model that hidden states are drawn to while training: `vit-caption`, `vit-self`, or a folder
            with one of the transformers library, of timm, or of ours; empty = none.

    Raises:
        UserError: a value is out of range.
    """

    training: TrainConfig
    transformer: dict[str, Any]
    data: str = ""
    size: int = 64
    tokenizer: str | None = None
    enough: float = 28.0
    autoencoder_training: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=600, batch=8, learning_rate=5e-4, warmup=20, decay="linear-cooldown", ema=0.98, save_every=100
        )
    )
    text_length: int = 32
    objective: FlowMatching = field(default_factory=FlowMatching)
    guidance: float = 2.0
    shift: int = 0
    cluster: str = ""
    workers: int = 2
    tuned_width: int | None = None
    teacher: str = ""

    def __post_init__(self):
        if self.text_length not in TEXT_LENGTHS:
            raise UserError(f"text_length is {self.text_length}; it must be from 4 to 512 tokens")
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"guidance is {self.guidance}; it must be a number from 0 (1 = off)")
        if not 0 <= self.shift <= self.size // 8:
            raise UserError(f"shift is {self.shift}; it must be from 0 to {self.size // 8}, an eighth of the size")


PRESETS = {
    "cpu": FolderRecipe(
        transformer={"heads": 6, "head_dim": 32},
        training=TrainConfig(
            steps=800, batch=32, learning_rate=1.5e-3, warmup=20, decay="linear-cooldown",
            ema=0.99, save_every=100, sample_every=300, eval_every=100,
        ),
    ),
    "gpu": FolderRecipe(
        transformer={"heads": 8, "head_dim": 32},
        training=TrainConfig(
            steps=20000, batch=256, learning_rate=1.5e-3, optimizer="muon", warmup=500, decay="linear-cooldown",
            ema=0.999, precision="bf16", compile=True, save_every=1000, sample_every=1000, eval_every=500,
        ),
    ),
}  # fmt: skip


def train(recipe: FolderRecipe, out: Path, resume: bool = False) -> Path:
    """Trains on the folder and writes the pipeline to `out / "model"`, whose path it returns.

    Raises:
        UserError: a folder that cannot be used, a place that cannot be written or holds something else.
    """
    processes = join_processes()
    with processes.main_process_first():  # if something is amiss, the first one says so and the others end with it
        check_places(recipe.data, out)
        if is_main():
            check_run(out, resume)
        base = base_autoencoder(recipe.tokenizer).to(processes.device)  # type: ignore[arg-type]  # diffusers wraps `to`
        multiple = base.factor * patch_size(recipe.transformer, recipe.size, base)
        pictures = load_folder(recipe.data, recipe.size, multiple, progress=is_main())
        started = start_transformer(recipe, base, pictures)
        facts = facts_of(base, pictures)
        if is_main():
            open_run(out, facts | {"settings": identity(recipe)}, resume)
            report_pictures(pictures)
    split = split_pictures(pictures)
    autoencoder = fitted_autoencoder(
        base, pictures, split.train_groups, out,
        enough=recipe.enough if recipe.tokenizer is None else None, config=recipe.autoencoder_training, resume=resume,
    )  # fmt: skip
    with processes.main_process_first():  # the others find the caches
        teacher = teacher_of(recipe, base)
        source, held_out = latent_sources(
            autoencoder, pictures, split, recipe.text_length, out / "cache", recipe.shift, recipe.cluster,
            recipe.workers, teacher,
        )  # fmt: skip
    pipe = build_pipeline(
        started.model, autoencoder, pictures, size=recipe.size, text_length=recipe.text_length, guidance=recipe.guidance
    )
    shown = [split.train[index] for index in spread(len(split.train), SAMPLES)]

    def draw(ema_model: nn.Module, step: int, folder: Path) -> None:
        pipe.register_modules(transformer=ema_model)
        with atomic_file(folder / f"step-{step:06d}.png") as file:
            sample_sheet(pipe, pictures, shown).save(file, format="PNG")

    facts["autoencoder"] = weights_hash(autoencoder)
    trainer = Trainer(
        started.model, recipe.objective, source, recipe.training, out / "transformer",
        held_out=held_out, on_sample=draw, description=facts, factors=started.factors,
        losses=started.losses(teacher),
    )  # fmt: skip
    report = trainer.fit(resume=resume)
    if is_main():
        pipe.register_modules(transformer=started.plain(trainer.ema_model).eval())
        say(overfitting(report.curve))
        found = memorising(pipe, pictures, split.train)
        say(found.sentence)
        settings = plain(recipe)
        card = facts | {"settings": settings, "settings_hash": settings_hash(settings)}
        card |= {"images_seen": report.steps * recipe.training.batch, **last_losses(report.curve)}
        save_model(pipe, out / "model", card | {"metrics": found.figures})
    processes.wait_for_everyone()
    return out / "model"


@dataclass(frozen=True)
class Started:
    """A transformer with fresh weights.

    Args:
        model: to be trained.
        mu: its parametrisation; None = none.
        optimizer: that trains it.
    """

    model: MMDiT | DiT
    mu: MuP | None
    optimizer: str

    @property
    def factors(self) -> dict[str, Factors] | None:
        """On the rates of its parameters."""
        return None if self.mu is None else self.mu.factors(self.model, self.optimizer)

    def losses(self, teacher: Teacher | None) -> list[REPA]:
        """Terms that it is trained with besides its objective."""
        config = self.model.config
        return [] if teacher is None else [teacher.term(self.model, config["heads"] * config["head_dim"])]

    def plain(self, model: nn.Module) -> nn.Module:
        """A trained one as it is saved."""
        return model if self.mu is None else self.mu.fold(model)


def start_transformer(recipe: FolderRecipe, base: Autoencoder, pictures: FolderSet) -> Started:
    """The untrained transformer for these pictures."""

    def build(width: int | None = None) -> MMDiT | DiT:
        heads = {} if width is None else {"heads": width // recipe.transformer["head_dim"]}
        return build_transformer(recipe.transformer | heads, recipe.size, base, pictures)

    torch.manual_seed(recipe.training.seed)
    if recipe.tuned_width is None:
        return Started(build(), None, recipe.training.optimizer)
    mu = MuP(build, recipe.tuned_width, start="own")
    width = recipe.transformer["heads"] * recipe.transformer["head_dim"]
    return Started(mu.model(width), mu, recipe.training.optimizer)  # type: ignore[arg-type]  # what `build` made


def teacher_of(recipe: FolderRecipe, base: Autoencoder) -> Teacher | None:
    """What the transformer is drawn to, if anything."""
    cell = base.factor * patch_size(recipe.transformer, recipe.size, base)
    return Teacher(recipe.teacher, cell, base.device) if recipe.teacher else None


def check_places(data: str, out: Path) -> None:
    """Raises `UserError` unless there is a folder of pictures, and what is written will not lie among them."""
    if not data:
        raise UserError("no folder of pictures was given; set data, or use --data FOLDER")
    if out.resolve().is_relative_to(Path(data).resolve()):
        raise UserError(f"{out} lies in the folder of the pictures, {data}; choose an --out beside it")


def facts_of(base: Autoencoder, pictures: FolderSet) -> dict[str, Any]:
    """What names the data and the starting point of a training."""
    conditions = json.dumps([pictures.captions, pictures.labels, pictures.label_names])
    return {
        "recipe": "folder",
        "data_hash": pictures.hash,
        "conditions_hash": hashlib.sha256(conditions.encode("utf-8", "surrogateescape")).hexdigest()[:16],
        "base_autoencoder": weights_hash(base),
    }


def identity(recipe: FolderRecipe) -> dict[str, Any]:
    """The settings with which another training would have other weights; where its files lie does not count."""
    others = ("data", "tokenizer", "guidance", "cluster", "workers")
    settings = {key: value for key, value in plain(recipe).items() if key not in others}
    return settings | {
        "training": recipe.training.identity(),
        "autoencoder_training": recipe.autoencoder_training.identity(),
    }


def report_pictures(pictures: FolderSet) -> None:
    """Says what was found, left out, and is to be expected of it."""
    for one in pictures.skipped:
        say(f"skipped {one.file}: {one.reason}")
    kind = "captions" if pictures.captions else f"{len(pictures.label_names)} labels" if pictures.labels else "nothing"
    shapes = len(set(pictures.shapes))
    say(f"{len(pictures)} pictures of {'one shape' if shapes == 1 else f'{shapes} shapes'}, conditioned on {kind}")
    if len(pictures) < FEW:
        say("so few pictures are learned by heart: expect these again rather than new ones of their kind")


def overfitting(log: Path) -> str:
    """A sentence on the held-out loss of a training: whether it was still falling."""
    losses = {line["step"]: line["held_out_loss"] for line in read_log(log) if "held_out_loss" in line}
    if len(losses) < 2:
        return "nothing was held out, so whether new pictures profit cannot be told"
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    if losses[last] <= RISE * losses[best]:
        return (
            f"the held-out loss was {losses[last]:.4f} at the end, {losses[min(losses)]:.4f} after step {min(losses):g}"
        )
    return (
        f"overfitting: the held-out loss was lowest after step {best:g} ({losses[best]:.4f}) and is {losses[last]:.4f} "
        "now; more pictures, or a smaller model, would help"
    )


def last_losses(log: Path) -> dict[str, float]:
    """The last loss in a log, and the last held-out one if there is any."""
    last = {key: value for line in read_log(log) for key, value in line.items()}
    return {key: last[key] for key in ("loss", "objective", "held_out_loss") if key in last}
