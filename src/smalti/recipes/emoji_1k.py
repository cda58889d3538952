"""The model `emoji-1k`: 128-pixel emoji, for claims that need more tokens than `emoji` has.

`gpu`: 32 x 32 tokens of an f4 autoencoder, from nothing. `cpu`: the shipped `emoji` goes on at 128 pixels, 16 x 16
tokens of its own f8 autoencoder, in under an hour on one core. The pictures come by `smalti data get emoji-128`.
"""

from dataclasses import replace
from pathlib import Path

from smalti.recipes import emoji
from smalti.recipes.emoji import EmojiRecipe
from smalti.training.config import TrainConfig

PRESETS = {
    "cpu": replace(
        emoji.PRESETS["cpu"],
        variant="emoji-128",
        size=128,
        start="emoji",
        measured=188,
        training=TrainConfig(
            steps=1200, batch=24, learning_rate=5e-4, warmup=50, decay="linear-cooldown", ema=0.99,
            sample_every=300, eval_every=300, save_every=50,
        ),
    ),
    "gpu": replace(
        emoji.PRESETS["gpu"],
        variant="emoji-128",
        size=128,
        transformer={"num_double": 2, "num_single": 6, "heads": 6, "head_dim": 32, "axes_dims_rope": (8, 12, 12)},
        training=replace(emoji.PRESETS["gpu"].training, steps=20000, batch=256),
    ),
}  # fmt: skip


def train(recipe: EmojiRecipe, out: Path, resume: bool = False) -> Path:
    """Trains and writes the pipeline; see `recipes.emoji.train`."""
    return emoji.train(recipe, out, resume, name="emoji-1k")
