"""One arm of a claim on emoji: a small denoiser trained for a while on cached latents, and how well it draws.

Latents are those of the autoencoder that ships in `emoji` (8 x 8 tokens of 16 channels), of all training concepts in
all styles. What differs between arms is the model, the objective, a loss or the data's features; everything else, the
seeds of order, noise and captions too, is the same.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from smalti.core.protocols import Batch, Cond, Objective, TextEmbedding
from smalti.data.emoji import STYLES, EmojiSet, load_emoji
from smalti.data.latent_cache import LatentCache, build_cache, cache_key
from smalti.data.packages import cache_folder
from smalti.evaluation.emoji_metrics import concept_numbers, drawn_distance, spread
from smalti.evaluation.probe import hidden_states, linear_probe
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji import latent_source
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.tokenizers.vision_backends import load_teacher
from smalti.training.alignment import Alignment
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.latent_source import LatentSource
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model, weights_hash

TEXT_LENGTH = 16
GRID = (8, 8)
BATCH = 64
CHANNELS, TEXT_WIDTH = 16, 384
"""Of the latents and of the text: what a backbone of an arm is built for; its labels are the styles."""


@dataclass(frozen=True)
class Stock:
    """What all arms on one autoencoder share, read once a process.

    Args:
        autoencoder: latents <-> pixels.
        encoder: of text, cached.
        train: samples of the training concepts, not shifted.
        held_out: samples of the others.
        train_pictures, held_out_pictures: the pictures behind them.
    """

    autoencoder: ModelMixin
    encoder: EmbeddingCache
    train: LatentSource
    held_out: LatentSource
    train_pictures: EmojiSet
    held_out_pictures: EmojiSet


@cache
def stock() -> Stock:
    """Makes or opens the caches of latents and embeddings; call it once before arms are trained side by side."""
    return stock_of(load_model("emoji").autoencoder, is_drawn=True)


def stock_of(autoencoder: Any, is_drawn: bool = False) -> Stock:
    """The stock of another autoencoder; with `is_drawn`, training samples are drawn from its posterior each time."""
    folder = cache_folder() / "arms"
    encoder = EmbeddingCache(MiniLMEncoder(length=TEXT_LENGTH), cache_folder() / "text")
    train, held_out = load_emoji("train"), load_emoji("held-out")
    return Stock(
        autoencoder, encoder,
        latent_source(autoencoder, train, encoder, STYLES, folder, is_drawn=is_drawn),
        latent_source(autoencoder, held_out, encoder, STYLES, folder),
        train, held_out,
    )  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What an arm ended with.

    Args:
        pipe: draws with the averaged weights.
        held_out_loss: the objective on held-out concepts.
        images_per_second: of the training.
    """

    pipe: TextToImagePipeline
    held_out_loss: float
    images_per_second: float

    @property
    def model(self) -> ModelMixin:
        """The averaged denoiser."""
        return self.pipe.transformer

    def distance(self, count: int = 400, steps: int = 20, guidance: float = 2.0) -> float:
        """Fréchet distance of pictures drawn from held-out captions to as many real held-out pictures."""
        return drawn_distance(self.pipe, None, steps, count, guidance)


def train_emoji_arm(
    model: ModelMixin,
    config: TrainConfig,
    *,
    objective: Objective | None = None,
    source: SampleSource | None = None,
    losses: Sequence[Alignment] = (),
    shared: Stock | None = None,
    shift: float = 1.0,
) -> Trained:
    """Trains a denoiser of 16 channels, or those of another stock, text width 384 and four labels.

    Args:
        model: changed in place.
        config: steps, batch, rates and seed.
        objective: flow matching if None.
        source: samples instead of the stock's.
        losses: added to the objective.
        shared: stock of another autoencoder.
        shift: of the schedule with which pictures are drawn.
    """
    shared = shared or stock()
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        trainer = Trainer(
            model, objective or FlowMatching(), source or shared.train, config, Path(folder),
            held_out=shared.held_out, losses=losses,
        )  # fmt: skip
        report = trainer.fit()
    averaged: Any = trainer.ema_model.eval()
    pipe = TextToImagePipeline(
        averaged, shared.autoencoder, make_scheduler("euler"), text_length=TEXT_LENGTH, styles=list(STYLES),
        default_shift=shift,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.use_text_encoder(shared.encoder)
    assert report.held_out_loss is not None, "eval_every is 0: an arm is measured on held-out concepts"
    return Trained(pipe, report.held_out_loss, report.images_per_second)


def feature_tables(teacher: str) -> tuple[LatentCache, LatentCache]:
    """Patch features (N, 64, Dz) of all training and held-out pictures, made once.

    Args:
        teacher: a name that `load_teacher` knows.
    """
    shared = stock()
    model = load_teacher(teacher, GRID)

    def table(pictures: EmojiSet, split: str) -> LatentCache:
        key = cache_key("features", pictures.hash, split, teacher, weights_hash(model))
        return build_cache(
            cache_folder() / "arms", key, len(pictures), lambda rows: model(pictures.pixels(rows)), progress=True
        )

    return table(shared.train_pictures, "train"), table(shared.held_out_pictures, "held-out")


def group_probe(model: ModelMixin, depth: int, t: float = 0.3, count: int = 2000) -> float:
    """Share of held-out pictures whose emojibase group a linear probe reads off their mean hidden state.

    The model sees noisy latents without caption and style, so what the probe finds was seen in the picture.

    Args:
        model: a denoiser of an arm.
        depth: block whose output is probed, from 1.
        t: time of the latents.
        count: training pictures that the probe is fitted on.
    """
    shared = stock()
    names = sorted({item.group for item in shared.train_pictures.items})
    rows = spread(len(shared.train), count)
    states = [
        hidden_states(model, _without_conditions(source, some), t, [depth])[depth]
        for source, some in ((shared.train, rows), (shared.held_out, range(len(shared.held_out))))
    ]
    classes = [torch.tensor([names.index(item.group) for item in pictures.items])
               for pictures in (shared.train_pictures, shared.held_out_pictures)]  # fmt: skip
    concepts = concept_numbers(shared.train_pictures)[rows]
    return linear_probe(states[0], classes[0][rows], concepts, states[1], classes[1])


def _without_conditions(source: LatentSource, rows: Sequence[int]) -> Iterator[Batch]:
    """Batches of latents with the empty prompt and no style."""
    assert source.captions is not None
    empty = source.captions.text[-1:].to(torch.float32)
    for start in range(0, len(rows), BATCH):
        some = torch.tensor(rows[start : start + BATCH])
        text = TextEmbedding.cat([empty] * len(some))
        label = torch.full((len(some),), len(STYLES))
        yield Batch(source.views[0][some], Cond(text.tokens, text.pooled, text.mask, label), some)
