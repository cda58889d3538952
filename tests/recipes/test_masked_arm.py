"""Arms cost the same and differ in what they say, and one trains through both stages."""

import pytest
import torch

import smalti.recipes.masked_arm as recipe
from smalti.core.protocols import TextEmbedding
from smalti.recipes.emoji_arm import CHANNELS, TEXT_WIDTH, Stock
from smalti.recipes.masked_arm import UNMASKED, MaskedArm, of_style, step_flops, steps_within, train_masked_arm
from smalti.systems.microdit import ARMS, DEAR
from smalti.training.latent_source import Captions, LatentSource
from smalti.zoo.loader import load_model


@pytest.fixture(scope="module")
def stock():
    """Sixteen samples of noise in four styles, in place of all emoji."""
    tokens = torch.randn(2, 16, TEXT_WIDTH)
    text = TextEmbedding(tokens, tokens[:, 0], torch.ones(2, 16, dtype=torch.bool), torch.zeros(2, 16).long())
    source = LatentSource(
        [torch.randn(16, CHANNELS, 8, 8)], Captions(text, torch.tensor([[0, 1]] * 16)), torch.arange(16) % 4, 4
    )
    return Stock(load_model("emoji").autoencoder, None, source, source, None, None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _stock(stock, monkeypatch):
    monkeypatch.setattr(recipe, "stock", lambda: stock)


@pytest.mark.parametrize("name", ARMS)
def test_all_arms_cost_the_same(name):
    arm, budget = ARMS[name], 3e12
    steps = steps_within(arm, budget)
    last = round(UNMASKED * steps)
    spent = (steps - last) * step_flops(arm, True) + last * step_flops(arm, False)
    assert spent == pytest.approx(budget * (2.5 if name == DEAR else 1), rel=0.01)


def test_arms_differ_in_one_thing():
    sizes = {name: sum(one.numel() for one in arm.model().parameters()) for name, arm in ARMS.items()}
    assert sizes["deferred"] == pytest.approx(sizes["naive"], rel=0.05)
    assert sizes["all tokens, fewer steps"] == sizes["naive"] == sizes[DEAR]
    assert sizes["smaller"] < 0.5 * sizes["naive"]
    assert ARMS["deferred"].model().mixer is not None
    assert ARMS["naive"].model().mixer is None
    assert {arm.ratio for name, arm in ARMS.items() if name in ("deferred", "naive", "maskdit")} == {0.75}


def test_one_style_is_a_quarter_of_the_samples(stock):
    assert torch.equal(of_style(stock.train).groups[0] % 4, torch.full((4,), int(of_style(stock.train).groups[0][0])))
    assert len(of_style(stock.train).groups[0]) == 4


def test_an_arm_trains_through_both_stages():
    found = train_masked_arm(MaskedArm(width=16, depth=2, mixer=1), 4e9, seed=0)
    assert found.steps > 5
    assert found.flops == pytest.approx(4e9, rel=0.1)
    assert 0 < found.trained.held_out_loss < 10
    assert found.trained.model is found.trained.pipe.transformer
