"""One arm of a claim on emoji: a small denoiser trained for a while on cached latents, and how well it draws.

Latents are those of the autoencoder that ships in `emoji` (8 x 8 tokens of 16 channels), of all training concepts in
all styles. What differs between arms is the model, the objective, a loss or the data's features; everything else, the
seeds of order, noise and captions too, is the same.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from smalti.core.protocols import Objective
from smalti.data.emoji import STYLES, EmojiSet, load_emoji
from smalti.data.packages import cache_folder
from smalti.evaluation.emoji_metrics import drawn_distance
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji import latent_source
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.alignment import Alignment
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.latent_source import LatentSource
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model

TEXT_LENGTH = 16
CHANNELS, TEXT_WIDTH = 16, 384
"""Of the latents and of the text: what a backbone of an arm is built for; its labels are the styles."""


@dataclass(frozen=True)
class Stock:
    """What all arms share, read once a process.

    Args:
        autoencoder: latents <-> pixels.
        encoder: of text, cached.
        train: samples of the training concepts, not shifted.
        held_out: samples of the others.
        train_pictures, held_out_pictures: the pictures behind them.
    """

    autoencoder: ConvAutoencoder
    encoder: EmbeddingCache
    train: LatentSource
    held_out: LatentSource
    train_pictures: EmojiSet
    held_out_pictures: EmojiSet


@cache
def stock() -> Stock:
    """Makes or opens the caches of latents and embeddings; call it once before arms are trained side by side."""
    folder = cache_folder() / "arms"
    autoencoder = load_model("emoji").autoencoder
    encoder = EmbeddingCache(MiniLMEncoder(length=TEXT_LENGTH), cache_folder() / "text")
    train, held_out = load_emoji("train"), load_emoji("held-out")
    return Stock(
        autoencoder, encoder,
        latent_source(autoencoder, train, encoder, STYLES, folder),
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
) -> Trained:
    """Trains a denoiser of 16 channels on 8 x 8 tokens, text width 384 and four labels.

    Args:
        model: changed in place.
        config: steps, batch, rates and seed.
        objective: flow matching if None.
        source: samples instead of the stock's.
        losses: added to the objective.
    """
    shared = stock()
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        trainer = Trainer(
            model, objective or FlowMatching(), source or shared.train, config, Path(folder),
            held_out=shared.held_out, losses=losses,
        )  # fmt: skip
        report = trainer.fit()
    averaged: Any = trainer.ema_model.eval()
    pipe = TextToImagePipeline(
        averaged, shared.autoencoder, make_scheduler("euler"), text_length=TEXT_LENGTH, styles=list(STYLES)
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.use_text_encoder(shared.encoder)
    assert report.held_out_loss is not None, "eval_every is 0: an arm is measured on held-out concepts"
    return Trained(pipe, report.held_out_loss, report.images_per_second)
