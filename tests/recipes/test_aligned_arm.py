"""Arms are alike but for their losses, measured on the way, and losses end as their rules say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import smalti.recipes.aligned_arm as recipe
from smalti.core.protocols import TextEmbedding
from smalti.data.emoji import EmojiSet
from smalti.recipes.aligned_arm import PictureTable, arm_config, arm_model, train_aligned_arm, with_pictures
from smalti.recipes.emoji_arm import CHANNELS, GRID, TEXT_WIDTH, Stock, Trained
from smalti.systems import haste
from smalti.systems.haste import SETTINGS
from smalti.systems.sra import ARMS
from smalti.tokenizers.vision_backends import load_teacher
from smalti.training.haste import HolisticAlignment
from smalti.training.latent_source import Captions, LatentSource
from smalti.training.sra import SelfAlignment
from smalti.training.stopping import StopAt
from smalti.zoo.loader import load_model


@pytest.fixture(autouse=True)
def _stock(monkeypatch):
    """Sixteen samples of noise in four styles, in place of all emoji; distances are not drawn."""
    tokens = torch.randn(2, 16, TEXT_WIDTH)
    text = TextEmbedding(tokens, tokens[:, 0], torch.ones(2, 16, dtype=torch.bool), torch.zeros(2, 16).long())
    source = LatentSource(
        [torch.randn(16, CHANNELS, *GRID)], Captions(text, torch.tensor([[0, 1]] * 16)), torch.arange(16) % 4, 4
    )
    pictures = EmojiSet([None] * 16, np.full((16, 64, 64, 4), 255, np.uint8), "hash")
    stock = Stock(load_model("emoji").autoencoder, None, source, source, pictures, pictures)  # type: ignore[arg-type]
    monkeypatch.setattr(recipe, "stock", lambda: stock)
    monkeypatch.setattr(Trained, "distance", lambda self, count, steps=20, guidance=1.0: float(count))


def config(steps=4):
    return replace(arm_config(steps, 0), batch=4, log_every=1, eval_samples=4)


def test_an_arm_is_measured_at_its_marks_and_keeps_its_log():
    done = train_aligned_arm(config(), marks=(2,), count=7)
    assert done.distances == {2: 7.0}
    assert len(done.curve("loss")) == 4
    assert 0 < done.trained.held_out_loss < 10


def test_marks_are_evenly_spaced_or_refused():
    with pytest.raises(AssertionError, match="evenly"):
        train_aligned_arm(config(), marks=(2, 3))


@pytest.mark.parametrize("steps", [6, 9])
def test_arms_of_haste_are_measured_on_their_way_for_any_number_of_steps(steps, monkeypatch):
    monkeypatch.setattr(haste, "arm_config", lambda steps, seed: config(steps))
    found = haste.arm("plain", 0, steps)
    assert {"distance, 25 %", "distance, 50 %", "distance"} <= set(found)


def test_pictures_come_along_for_a_live_teacher_until_a_rule_ends_it():
    assert PictureTable(recipe.stock().train_pictures)[torch.tensor([0, 3])].shape == (2, 3, 64, 64)
    term = HolisticAlignment(recipe.WIDTH, load_teacher("random", GRID), SETTINGS)
    done = train_aligned_arm(config(), [term], [StopAt(("haste",), 2)], with_pictures())
    assert len(done.curve("attention cross-entropy")) == 2


def test_arms_begin_alike():
    one, other = arm_model(3), arm_model(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name, chosen in ARMS.items() if chosen is not None])
def test_arms_of_sra_can_be_trained(name):
    term = SelfAlignment(recipe.WIDTH, replace(ARMS[name], start=2))
    done = train_aligned_arm(config(), [term])
    assert len(done.curve("self distance")) == 2
