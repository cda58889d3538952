"""One arm of a claim on adaptation: the shipped `emoji`, frozen, learns a set of concepts that it never saw.

`emoji` was trained on six topics; target sets are groups of emojibase outside of them, in the same styles. Each is
split by concept; a small set has the pictures of few concepts and is measured on others of its group.
"""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smalti.core.errors import unknown_name
from smalti.core.protocols import Cond
from smalti.core.seeds import generators_for
from smalti.data.emoji import STYLES, TOPICS, EmojiSet, load_emoji
from smalti.data.packages import cache_folder
from smalti.evaluation.emoji_metrics import draw_captions, picture_features, spread, take
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.frechet import frechet_distance
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji import latent_source
from smalti.recipes.emoji_arm import stock
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.training.adapters import full_copy
from smalti.training.config import TrainConfig
from smalti.training.latent_source import LatentSource
from smalti.training.shared_base import Method
from smalti.training.task_bank import TaskBank
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model

GROUPS = {
    "flags": "flags", "symbols": "symbols", "people": "people-body", "objects": "objects",
    "places": "travel-places", "few": "activities",
}  # fmt: skip
FEW, DRAWN, STEPS = 96, 96, 20
"""Training pictures of the small set; pictures drawn at most; sampling steps."""


@dataclass(frozen=True)
class Target:
    """Pictures that are trained on, and pictures of other concepts."""

    train: EmojiSet
    held_out: EmojiSet


def target(name: str) -> Target:
    """A target set; raises `UserError` for an unknown name."""
    if name not in GROUPS:
        raise unknown_name("target set", name, GROUPS)

    def unseen(split: str) -> EmojiSet:
        pictures = load_emoji(split).select(groups=[GROUPS[name]])
        return take(pictures, [i for i, item in enumerate(pictures.items) if not any(t(item) for t in TOPICS.values())])

    if name != "few":
        held_out = unseen("held-out")
        return Target(unseen("train"), take(held_out, spread(len(held_out), DRAWN)))
    pictures = unseen("all")
    concepts = sorted({item.concept for item in pictures.items})[:: len(pictures) // FEW]
    known = [i for i, item in enumerate(pictures.items) if item.concept in concepts][:FEW]
    others = [i for i, item in enumerate(pictures.items) if item.concept not in concepts]
    return Target(take(pictures, known), take(pictures, [others[i] for i in spread(len(others), DRAWN)]))


def sources(one: Target) -> tuple[LatentSource, LatentSource]:
    """Latents and captions of a target, trained on and held out; made once and kept."""
    shared, folder = stock(), cache_folder() / "arms"
    return (
        latent_source(shared.autoencoder, one.train, shared.encoder, STYLES, folder, is_drawn=True),
        latent_source(shared.autoencoder, one.held_out, shared.encoder, STYLES, folder),
    )


def distance(pipe: TextToImagePipeline, pictures: EmojiSet) -> float:
    """Fréchet distance of what a pipeline draws from the captions of pictures, without guidance, to the pictures."""
    extract = EfficientNetLite0()
    drawn = draw_captions(pipe, pictures, STEPS, guidance=1.0)
    return frechet_distance(extract(drawn), picture_features(extract, pictures))


def pipeline() -> TextToImagePipeline:
    """The shipped model with cached text."""
    pipe = load_model("emoji")
    pipe.set_progress_bar_config(disable=True)
    pipe.use_text_encoder(stock().encoder)
    return pipe


def adapt(method: Method | None, name: str, config: TrainConfig) -> dict[str, float]:
    """Adapts `emoji` to a target set.

    Args:
        method: of the parameters, or None for all of them.
        name: of the target set.
        config: of the training.

    Returns:
        Fréchet distance and loss on held-out concepts, the share of parameters, images per second.
    """
    one, pipe = target(name), pipeline()
    train, held_out = sources(one)
    torch.manual_seed(config.seed)
    bank = None if method is None else TaskBank.wrap(pipe.transformer, method)
    if bank is not None:
        bank.add(name)
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        trainer = Trainer(
            full_copy(pipe.transformer) if bank is None else bank.train(name),
            FlowMatching(), train, config, Path(folder), held_out=held_out,
            factors=None if bank is None else bank.factors(),
        )  # fmt: skip
        report = trainer.fit()
    if bank is None:
        pipe.register_modules(transformer=trainer.ema_model.eval())
    else:
        bank.put(trainer.ema_model)
    with nullcontext() if bank is None else bank.using(name):
        found = distance(pipe, one.held_out)
    assert report.held_out_loss is not None
    return {
        "distance": found,
        "held-out loss": report.held_out_loss,
        "share": 1.0 if bank is None else bank.share(name),
        "images per second": report.images_per_second,
    }


def floor(one: Target) -> float:
    """Fréchet distance of as many real training pictures, spread over the set, to the held-out ones."""
    extract, count = EfficientNetLite0(), min(len(one.train), len(one.held_out))
    some = [take(pictures, spread(len(pictures), count)) for pictures in (one.train, one.held_out)]
    return frechet_distance(*(picture_features(extract, pictures) for pictures in some))


def noise_and_cond(count: int) -> tuple[Tensor, Cond]:
    """Noise (B, 16, 8, 8) and conditions of the first held-out concepts."""
    rows = torch.arange(count)
    batch = stock().held_out.batch(rows, generators_for(rows.tolist()))
    return torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(0)), batch.cond


@torch.no_grad()
def drift(bank: TaskBank, count: int = 4) -> float:
    """Largest change of the bare model's output after two tasks were added, filled with noise and used."""
    x, cond = noise_and_cond(count)
    t = torch.full((count,), 0.5)
    before = bank(x, t, cond)
    for name in ("one", "two"):
        bank.add(name)
        for value in bank.tasks.task_state(name).values():
            value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
        bank(x, t, cond, task=name)
    return float((bank(x, t, cond) - before).abs().max())


@torch.no_grad()
def mixed_error(bank: TaskBank, count: int = 4, steps: int = 8) -> float:
    """Largest difference of samples (B, 16, 8, 8) whose batch mixes two tasks to those of one task at a time."""
    noise, cond = noise_and_cond(count)

    def draw(task: str | list[str], rows: slice) -> Tensor:
        x = noise[rows]
        for step in range(steps):
            x = x - bank(x, torch.full((len(x),), 1 - step / steps), cond[rows], task=task) / steps
        return x

    tasks = [bank.names[row % 2] for row in range(count)]
    alone = torch.cat([draw(task, slice(row, row + 1)) for row, task in enumerate(tasks)])
    return float((draw(tasks, slice(None)) - alone).abs().max())
