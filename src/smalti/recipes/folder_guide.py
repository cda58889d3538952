"""What to train on a folder within a time: width, depth, batch, steps and rate, and the loss to expect.

Width: the widest model that sees at least `TOKENS_PER_WEIGHT` tokens for each of its weights in the time there is; a
wider one would not be through its youth. Rate: what the recipe was tuned for at its own width, carried over by muP
(arXiv 2203.03466), times the root of the batch's ratio (arXiv 2205.10287, for Adam). Loss: that of a short trial,
carried on by a power of the pictures seen, `loss ~ images^-b`: b begins as it was in the trial and fades to the smaller
one that trainings of this kind went on with; the last fifth, in which the rate falls, takes some more off. Pictures
that are seen often are also seen moved by a few pixels, which a model does not learn by heart as soon.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from smalti.core.errors import UserError
from smalti.recipes.folder import FolderRecipe
from smalti.training.config import TrainConfig

WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024)
HEAD = 32
TOKENS_PER_WEIGHT = 5.0
TUNED_WIDTH, TUNED_BATCH, TUNED_RATE = 192, 32, 1.5e-3
BATCHES = (16, 32, 64, 128, 256)
STEPS = 1500
"""A batch is doubled while at least so many steps are left."""
LEAST_STEPS = 50
SLOPES, LATE, FADE = (0.1, 0.5), 0.19, 1.5
"""Of the log of the loss over that of the pictures seen: what is believed of a trial, what it becomes, how soon."""
COOLDOWN = 0.91
"""What the falling rate of the last fifth leaves of the loss."""
OFTEN, REACH = 20, 32
"""Pictures that are seen more often than this are shifted, by so small a part of their side."""


@dataclass(frozen=True)
class Machine:
    """What was measured on this machine with these pictures.

    Args:
        device: cpu or cuda.
        seconds: of training, an image, by width of the model.
        weights: of the model, by width.
        tokens: of a picture, on average.
        besides: seconds that everything but the training and its pictures takes from now on.
        drawn: images whose training takes as long as sheets, held-out losses and the last check do.
    """

    device: str
    seconds: Mapping[int, float]
    weights: Mapping[int, int]
    tokens: float
    besides: float
    drawn: float


@dataclass(frozen=True)
class Choice:
    """What is trained.

    Args:
        width: of the model.
        batch: samples a step.
        steps: of the training.
        rate: peak rate at the tuned width; muP carries it to this one.
        seconds: that the training takes by what was measured.
        shift: pixels by which pictures are also seen moved.
    """

    width: int
    batch: int
    steps: int
    rate: float
    seconds: float
    shift: int = 0

    @property
    def images(self) -> int:
        """Pictures seen in all."""
        return self.steps * self.batch


def choose(machine: Machine, seconds: float) -> Choice:
    """The model and its training for so many seconds from now on.

    Raises:
        UserError: the time is too short for anything.
    """
    left = {width: seconds - machine.besides - machine.drawn * cost for width, cost in machine.seconds.items()}
    fitting = [
        width
        for width, cost in machine.seconds.items()
        if is_worth_it(left[width] / cost * machine.tokens, machine.weights[width])
    ]
    width = max(fitting, default=min(machine.seconds))
    images = max(0.0, left[width]) / machine.seconds[width]
    batch = max((one for one in BATCHES if images / one >= STEPS), default=BATCHES[0])
    steps = int(images / batch)
    if steps < LEAST_STEPS:
        raise UserError(
            f"{max(0.0, left[width]):.0f} s are left for the training, enough for {steps} steps; give a larger --budget"
        )
    return Choice(
        width, batch, steps, TUNED_RATE * math.sqrt(batch / TUNED_BATCH), steps * batch * machine.seconds[width]
    )


def shift_of(pictures: int, images: int, size: int) -> int:
    """Pixels by which pictures are also seen moved, in a training that sees so many images of them."""
    return size // REACH if images > OFTEN * pictures else 0


def is_worth_it(tokens: float, weights: int) -> bool:
    """Whether a model sees enough for its size."""
    return tokens >= TOKENS_PER_WEIGHT * weights


def forecast(images: Sequence[float], losses: Sequence[float], total: float) -> float:
    """The training loss after so many pictures.

    Args:
        images: pictures seen at each point of a trial.
        losses: its losses there.
        total: pictures of the whole training.

    Raises:
        UserError: the trial is too short to say anything.
    """
    if len(losses) < 4:
        raise UserError(f"a trial of {len(losses)} logged losses says nothing; give a larger --budget")
    half = len(losses) // 2
    x = torch.tensor(images[half:], dtype=torch.float64).log()
    y = torch.tensor(losses[half:], dtype=torch.float64).log()
    spread = (x - x.mean()).square().sum()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread else -LATE
    first = min(max(-slope, SLOPES[0]), SLOPES[1])
    late = min(first, LATE)
    last = fmean(losses[-max(1, len(losses) // 4) :])
    reached = fmean(images[-max(1, len(losses) // 4) :])
    if total <= reached:
        return last
    ratio = total / reached
    # The exponent late + (first - late) ratio^-FADE, integrated over the log of the ratio.
    fall = late * math.log(ratio) + (first - late) / FADE * (1 - ratio**-FADE)
    return COOLDOWN * last * math.exp(-fall)


def recipe_for(recipe: FolderRecipe, choice: Choice, device: str, has_text: bool) -> FolderRecipe:
    """The recipe with everything chosen; what it holds besides stays.

    Args:
        recipe: of the folder, its settings of the transformer included.
        choice: what was chosen.
        device: cpu or cuda.
        has_text: whether the pictures have captions.
    """
    steps = choice.steps
    training = TrainConfig(
        steps=steps, batch=choice.batch, learning_rate=choice.rate, warmup=min(100, steps // 10),
        decay="linear-cooldown", ema=max(0.9, 1 - 20 / steps), seed=recipe.training.seed,
        precision="bf16" if device == "cuda" else "no", save_every=max(1, steps // 8), keep_last=2,
        sample_every=max(1, steps // 2), eval_every=max(1, steps // 16),
        patience=10 * steps,  # never ends it, but the weights of the best held-out loss are the result
        minutes=1.05 * choice.seconds / 60,
    )  # fmt: skip
    return replace(
        recipe,
        training=training,
        transformer={**shape(choice.width, has_text), **recipe.transformer},
        tuned_width=TUNED_WIDTH,
        shift=choice.shift,
    )


def shape(width: int, has_text: bool) -> dict[str, int]:
    """Settings of the transformer of a width: deeper where it is wider."""
    blocks = 6 if width < 256 else 8 if width < 384 else 12
    depth = {"num_double": blocks // 4, "num_single": blocks - blocks // 4} if has_text else {"depth": blocks}
    return {"heads": width // HEAD, "head_dim": HEAD, **depth}
