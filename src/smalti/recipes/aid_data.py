"""What aids of training are compared on: emoji of one style by caption, and handwritten digits by class.

Both are 64 tokens for a small denoiser. Each data set says how a model of it is built, what it is trained on, and how
well it draws: a Fréchet distance, a share of pictures that show what was asked, and what a linear probe reads off its
hidden states.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.protocols import Batch, Cond
from smalti.data.digits import CLASSES, load_digits
from smalti.data.emoji import STYLES
from smalti.data.latent_cache import LatentCache, build_cache, cache_key
from smalti.data.packages import cache_folder
from smalti.evaluation.emoji_metrics import draw_captions, judge_text, load_judge
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.judges import judge_report
from smalti.evaluation.probe import hidden_states, linear_probe
from smalti.recipes.digits_arm import SHAPE as DIGITS_SHAPE
from smalti.recipes.digits_arm import TrainedDigits, digits_source
from smalti.recipes.emoji_arm import (
    CHANNELS,
    GRID,
    TEXT_LENGTH,
    TEXT_WIDTH,
    feature_tables,
    group_probe,
    stock,
)
from smalti.recipes.masked_arm import held_out_pictures, of_style
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.vision_backends import load_teacher
from smalti.training.latent_source import LatentSource
from smalti.zoo.loader import weights_hash

STEPS, GUIDANCE = 20, 2.0
"""How pictures are drawn; digits without guidance."""
PROBED, PROBE_TIME, BATCH = 2000, 0.3, 200
SIDE = 64
"""Of the pictures that teachers see."""


@dataclass(frozen=True)
class AidData:
    """One data set.

    Args:
        shape: arguments of a backbone.
        train, held_out: samples.
        features: from a teacher's name to its features (N, 64, Dz) of both.
        measure: figures of what a denoiser draws: `distance`, and `right`, the share that shows what was asked for.
        probe: share of held-out samples whose class is read off the hidden states after a block.
    """

    shape: Mapping[str, int]
    train: LatentSource
    held_out: LatentSource
    features: Callable[[str], tuple[LatentCache, LatentCache]]
    measure: Callable[[nn.Module], dict[str, float]]
    probe: Callable[[Any, int], float]

    def with_features(self, teacher: str, name: str) -> tuple["AidData", int]:
        """The data with a teacher's features in every batch, and their width."""
        tables = self.features(teacher)
        sources = [replace(one, features={name: [table]})
                   for one, table in zip((self.train, self.held_out), tables, strict=True)]  # fmt: skip
        return replace(self, train=sources[0], held_out=sources[1]), tables[0][torch.tensor([0])].shape[-1]


def emoji() -> AidData:
    """Emoji of one style, as latents of the autoencoder that ships."""
    shared = stock()
    shape = {"in_channels": CHANNELS, "patch_size": 1, "num_labels": len(STYLES), "pooled_dim": TEXT_WIDTH,
             "base_size": GRID[0]}  # fmt: skip
    train, held_out = of_style(shared.train), of_style(shared.held_out)
    return AidData(shape, train, held_out, feature_tables, _measure_emoji, group_probe)


def digits() -> AidData:
    """Handwritten digits, as pixels."""
    return AidData(
        DIGITS_SHAPE, digits_source("train"), digits_source("held-out"), digit_features, _measure_digits, digit_probe
    )


DATA = {"emoji": emoji, "digits": digits}


def _measure_emoji(model: Any) -> dict[str, float]:
    shared = stock()
    pipe = TextToImagePipeline(
        model, shared.autoencoder, make_scheduler("euler"), text_length=TEXT_LENGTH, styles=list(STYLES)
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.use_text_encoder(shared.encoder)
    pictures, real = held_out_pictures()
    features = EfficientNetLite0()(draw_captions(pipe, pictures, STEPS, GUIDANCE))
    captions = [one.label for one in pictures.items]
    judged = judge_report(load_judge(), features, _judge_text(), captions, [one.style for one in pictures.items])
    return {"distance": frechet_distance(features, real), "right": judged.first}


@cache
def _judge_text() -> Tensor:
    return judge_text([one.label for one in held_out_pictures()[0].items])


def _measure_digits(model: nn.Module) -> dict[str, float]:
    distance, accuracy = TrainedDigits(model, 0.0, 0.0).report(STEPS)
    return {"distance": distance, "right": accuracy}


def digit_features(teacher: str) -> tuple[LatentCache, LatentCache]:
    """A teacher's features (N, 64, Dz) of digits in three equal colours at 64 pixels, made once."""
    model = load_teacher(teacher, GRID)

    def table(split: str) -> LatentCache:
        digits = load_digits(split)  # type: ignore[arg-type]
        key = cache_key("digit features", digits.hash, split, teacher, weights_hash(model))

        def encode(rows: Tensor) -> Tensor:
            pixels = F.interpolate(digits.pixels()[rows], size=SIDE, mode="bilinear", align_corners=False)
            return model(pixels.expand(-1, 3, -1, -1).contiguous())

        return build_cache(cache_folder() / "arms", key, len(digits.labels), encode, progress=True)

    return table("train"), table("held-out")


def digit_probe(model: nn.Module, depth: int) -> float:
    """Share of held-out digits whose class a linear probe reads off their mean hidden state after a block.

    Args:
        model: a denoiser; it sees noisy digits without their class.
        depth: block, counted from 1.
    """
    states, classes = [], []
    for split in ("train", "held-out"):
        source = digits_source(split)
        rows = torch.arange(min(PROBED, len(source)))
        states.append(hidden_states(model, _unlabelled(source, rows), PROBE_TIME, [depth])[depth])
        classes.append(load_digits(split).labels[rows])
    return linear_probe(states[0], classes[0], torch.arange(len(classes[0])), states[1], classes[1])


def _unlabelled(source: LatentSource, rows: Tensor) -> Iterator[Batch]:
    for some in rows.split(BATCH):
        yield Batch(source.views[0][some], Cond(label=torch.full((len(some),), CLASSES)), some)
