"""The model `emoji-dit`: as `emoji`, by a transformer of another kind, for claims that need cross-attention.

Eight blocks of self-attention, cross-attention to the prompt and feed-forward on 8 x 8 tokens, with one modulation for
all of them, as in PixArt-alpha. `cpu`: latents and topics of the shipped `emoji`; `gpu`: an f4 autoencoder of its own
in patches of 2 x 2, all concepts.
"""

from dataclasses import replace
from pathlib import Path

from smalti.recipes import emoji
from smalti.recipes.emoji import EmojiRecipe

TRANSFORMER = {"depth": 8, "heads": 6, "head_dim": 32, "base_size": 8, "modulation": "shared"}
PRESETS = {
    "cpu": replace(
        emoji.PRESETS["cpu"],
        backbone="dit",
        autoencoder_of="emoji",
        transformer={"patch_size": 1, **TRANSFORMER},
        measured=188,
        training=replace(emoji.PRESETS["cpu"].training, steps=4000),
    ),
    "gpu": replace(
        emoji.PRESETS["gpu"],
        backbone="dit",
        transformer={"patch_size": 2, **TRANSFORMER},
    ),
}


def train(recipe: EmojiRecipe, out: Path, resume: bool = False) -> Path:
    """Trains and writes the pipeline; see `recipes.emoji.train`."""
    return emoji.train(recipe, out, resume, name="emoji-dit")
