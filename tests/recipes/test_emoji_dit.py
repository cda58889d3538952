"""`emoji-dit` is `emoji` with another transformer: its presets, and one training of a few steps."""

from dataclasses import replace

import pytest
import torch

from smalti.backbones.dit import DiT
from smalti.core.errors import UserError
from smalti.core.files import read_json
from smalti.recipes import emoji
from smalti.recipes.emoji import build_transformer
from smalti.recipes.emoji_dit import PRESETS, train
from smalti.training.config import TrainConfig
from smalti.zoo.loader import load_model

SMALL = {"depth": 1, "heads": 2, "head_dim": 8, "patch_size": 1, "modulation": "shared"}


def test_the_presets_have_64_tokens_and_cross_attention():
    for recipe, channels in ((PRESETS["cpu"], 16), (PRESETS["gpu"], 8)):
        model = build_transformer(recipe, 384, channels)
        assert isinstance(model, DiT)
        assert len(model.blocks) == 8
        assert all(block.cross is not None for block in model.blocks)
        assert 4.5e6 < sum(weight.numel() for weight in model.parameters()) < 6e6
    assert PRESETS["cpu"].topics == emoji.PRESETS["cpu"].topics


def test_the_whole_recipe_with_the_autoencoder_of_another_model(tmp_path):
    training = TrainConfig(steps=4, batch=4, sample_every=4, eval_every=4, eval_samples=8)
    small = {"topics": ("smileys", "food", "animals"), "styles": ("noto",), "measured": 40}
    recipe = replace(PRESETS["cpu"], transformer=SMALL, training=training, **small)
    folder = train(recipe, tmp_path)
    assert read_json(folder / "smalti.json")["recipe"] == "emoji-dit"
    pipe, other = load_model(folder), load_model("emoji")
    assert torch.equal(pipe.autoencoder.latents_mean, other.autoencoder.latents_mean)
    assert pipe("red apple", num_inference_steps=2).images[0].size == (64, 64)


def test_an_unknown_backbone_is_named():
    with pytest.raises(UserError, match="dit"):
        replace(PRESETS["cpu"], backbone="dot")
