"""Arms of trainings on some of the tokens, all at one cost in FLOPs: what differs is the model and its mask.

As in `emoji_arm`, latents are those of `emoji`, 64 tokens; here of one style, which a small model learns in minutes. An
arm has two stages: most of its steps with its mask, the last ones without, at falling rates. How many steps it gets
follows from what a step of either stage costs, counted, so that all arms spend the same.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.backbones.microdit import MicroDiT
from smalti.data.emoji import STYLES, EmojiSet, load_emoji
from smalti.evaluation.emoji_metrics import draw_captions, picture_features, take
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.training_cost import sample_flops
from smalti.objectives.masked_loss import MaskedFlowMatching
from smalti.ops.token_masks import RandomMask
from smalti.recipes.emoji_arm import CHANNELS, GRID, TEXT_LENGTH, TEXT_WIDTH, Trained, stock
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.training.config import TrainConfig
from smalti.training.latent_source import LatentSource
from smalti.training.sample_draws import draw
from smalti.training.stages import Stage, train_stages

STYLE, HEAD, BATCH = "noto", 16, 32
UNMASKED = 0.1
"""Share of the steps at the end that see all tokens."""
DRAWS, SAMPLING, GUIDANCE = 2, 10, 3.0
"""Pictures of each held-out caption, and how they are drawn."""


@dataclass(frozen=True)
class MaskedArm:
    """How one arm trains.

    Args:
        ratio: of tokens dropped in the first stage.
        width, depth: of the backbone.
        mixer: blocks of the patch-mixer, as wide as the backbone.
        decoder: blocks of MaskDiT's decoder.
        reconstruction: weight of MaskDiT's second loss.
        rate: peak learning rate.
        cost: budget of FLOPs, over that of all arms.
    """

    ratio: float = 0.75
    width: int = 64
    depth: int = 8
    mixer: int = 0
    decoder: int = 0
    reconstruction: float = 0.0
    rate: float = 2e-3
    cost: float = 1.0

    def model(self) -> MicroDiT:
        """Fresh weights; blocks are alike and dense, so that arms differ in nothing else."""
        return MicroDiT(
            in_channels=CHANNELS, patch_size=1, depth=self.depth, width=self.width, head_dim=HEAD, text_dim=TEXT_WIDTH,
            num_labels=len(STYLES), mixer_depth=self.mixer, mixer_width=self.width, decoder_depth=self.decoder,
            ffn_multiple=16, experts=0, ffn_ratios=(4.0, 4.0), attention_ratios=(1.0, 1.0), base_size=GRID[0],
        )  # fmt: skip

    def objective(self, is_masked: bool) -> MaskedFlowMatching:
        """Of the first stage, or of the second."""
        mask = RandomMask(self.ratio if is_masked else 0.0)
        return MaskedFlowMatching(mask, reconstruction=self.reconstruction if is_masked else 0.0)


@dataclass(frozen=True)
class MaskedResult:
    """What an arm ended with: the trained model, its steps in both stages together, FLOPs, and seconds of training."""

    trained: Trained
    steps: int
    flops: float
    seconds: float

    def distance(self) -> float:
        """Fréchet distance of pictures of held-out captions to the real ones."""
        pictures, real = held_out_pictures()
        drawn = draw_captions(self.trained.pipe, pictures, SAMPLING, GUIDANCE)
        return frechet_distance(EfficientNetLite0()(drawn), real)


@cache
def held_out_pictures() -> tuple[EmojiSet, Tensor]:
    """Held-out pictures of the style, each as often as it is drawn, and their features."""
    pictures = load_emoji("held-out", styles=[STYLE])
    features = picture_features(EfficientNetLite0(), pictures)
    return take(pictures, DRAWS * list(range(len(pictures)))), features.repeat(DRAWS, 1)


def of_style(source: LatentSource) -> LatentSource:
    """The samples of the style alone."""
    assert source.labels is not None
    return replace(source, groups=[(source.labels == STYLES.index(STYLE)).nonzero()[:, 0]])


def step_flops(arm: MaskedArm, is_masked: bool) -> float:
    """FLOPs of one training step."""
    rows = torch.arange(2)
    batch = draw(stock().train, rows, rows, 0, "cost", torch.device("cpu")).batch
    return BATCH * sample_flops(arm.model(), arm.objective(is_masked), batch)


def steps_within(arm: MaskedArm, budget: float) -> int:
    """Steps of both stages together that cost as much as the budget allows."""
    mean = (1 - UNMASKED) * step_flops(arm, True) + UNMASKED * step_flops(arm, False)
    return round(arm.cost * budget / mean)


def train_masked_arm(arm: MaskedArm, budget: float, seed: int) -> MaskedResult:
    """Trains one arm.

    Args:
        arm: which.
        budget: of FLOPs.
        seed: of weights, order, noise, times and masks.
    """
    shared, steps = stock(), steps_within(arm, budget)
    last = round(UNMASKED * steps)
    common: dict[str, Any] = {
        "batch": BATCH, "learning_rate": arm.rate, "ema": 0.99, "seed": seed, "save_every": 10**6, "log_every": 100,
    }  # fmt: skip
    first = TrainConfig(steps=steps - last, warmup=min(50, steps - last), **common)
    second = TrainConfig(steps=last, decay="cosine", eval_every=last, eval_samples=10**6, **common)
    torch.manual_seed(seed)
    stages = [
        Stage("masked", arm.objective(True), first, of_style(shared.train)),
        Stage("unmasked", arm.objective(False), second, held_out=of_style(shared.held_out)),
    ]
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        staged = train_stages(arm.model(), stages, Path(folder))
    averaged: Any = staged.averaged.eval()
    pipe = TextToImagePipeline(
        averaged, shared.autoencoder, make_scheduler("euler"), text_length=TEXT_LENGTH, styles=list(STYLES)
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.use_text_encoder(shared.encoder)
    loss, seconds = staged.reports[-1].held_out_loss, sum(one.seconds for one in staged.reports)
    assert loss is not None
    samples = sum(one.samples for one in staged.costs)
    return MaskedResult(Trained(pipe, loss, samples / seconds), steps, staged.flops, seconds)
