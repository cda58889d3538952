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

from smalti.core.errors import UserError
from smalti.core.files import atomic_file
from smalti.data.folder import FolderSet, load_folder
from smalti.evaluation.emoji_metrics import spread
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.folder_autoencoder import Autoencoder, base_autoencoder, fitted_autoencoder
from smalti.recipes.folder_model import build_pipeline, build_transformer, patch_size
from smalti.recipes.folder_samples import memorising, sample_sheet
from smalti.recipes.folder_source import latent_sources, split_pictures
from smalti.training.config import TrainConfig
from smalti.training.messages import is_main, say
from smalti.training.processes import join_processes
from smalti.training.progress import read_log
from smalti.training.run_folder import check_run, open_run
from smalti.training.run_state import plain
from smalti.training.trainer import Trainer
from smalti.zoo.loader import save_model, settings_hash, weights_hash

SAMPLES = 16
FEW = 1000
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

    def __post_init__(self):
        if self.text_length not in TEXT_LENGTHS:
            raise UserError(f"text_length is {self.text_length}; it must be from 4 to 512 tokens")
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"guidance is {self.guidance}; it must be a number from 0 (1 = off)")


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
        torch.manual_seed(recipe.training.seed)
        transformer = build_transformer(recipe.transformer, recipe.size, base, pictures)
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
        source, held_out = latent_sources(autoencoder, pictures, split, recipe.text_length, out / "cache")
    pipe = build_pipeline(
        transformer, autoencoder, pictures, size=recipe.size, text_length=recipe.text_length, guidance=recipe.guidance
    )
    shown = [split.train[index] for index in spread(len(split.train), SAMPLES)]

    def draw(ema_model: nn.Module, step: int, folder: Path) -> None:
        pipe.register_modules(transformer=ema_model)
        with atomic_file(folder / f"step-{step:06d}.png") as file:
            sample_sheet(pipe, pictures, shown).save(file, format="PNG")

    facts["autoencoder"] = weights_hash(autoencoder)
    trainer = Trainer(
        transformer, recipe.objective, source, recipe.training, out / "transformer",
        held_out=held_out, on_sample=draw, description=facts,
    )  # fmt: skip
    report = trainer.fit(resume=resume)
    if is_main():
        pipe.register_modules(transformer=trainer.ema_model.eval())
        found = memorising(pipe, pictures, split.train)
        say(found.sentence)
        settings = plain(recipe)
        card = facts | {"settings": settings, "settings_hash": settings_hash(settings)}
        card |= {"images_seen": report.steps * recipe.training.batch, **last_losses(report.curve)}
        save_model(pipe, out / "model", card | {"metrics": found.figures})
    processes.wait_for_everyone()
    return out / "model"


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
    settings = {key: value for key, value in plain(recipe).items() if key not in ("data", "tokenizer", "guidance")}
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


def last_losses(log: Path) -> dict[str, float]:
    """The last loss in a log, and the last held-out one if there is any."""
    last = {key: value for line in read_log(log) for key, value in line.items()}
    return {key: last[key] for key in ("loss", "held_out_loss") if key in last}
