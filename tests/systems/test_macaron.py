"""The arms of the claim differ in their order alone, and measure what the page reports."""

import pytest
import torch

from smalti.backbones.block import TransformerBlock
from smalti.backbones.block_order import count_parameters, read_order
from smalti.systems.macaron import ORDERS, _card_rule, _splitting, flow_model, words_arm, words_model


def check_pair(models):
    sizes = [count_parameters(model) for model in models]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.003)
    for model, order in zip(models, ORDERS, strict=True):
        assert {block.order for block in model.modules() if isinstance(block, TransformerBlock)} == {read_order(order)}


@pytest.mark.parametrize("modulation", ["own", "shared"])
def test_denoisers_are_equal_in_parameters(modulation):
    models = [flow_model(order, modulation) for order in ORDERS]
    check_pair(models)
    hidden = [models[0].blocks[0].ffn.proj_in.out_features, models[1].blocks[0].ffn_a.proj_in.out_features]
    assert (hidden[1] < 0.4 * hidden[0]) == (modulation == "own")  # adaLN of 9 D^2 is paid by the neurons
    assert (models[0].shared_modulation is not None) == (modulation == "shared")


def test_encoders_are_equal_in_parameters():
    check_pair([words_model(order) for order in ORDERS])


@pytest.mark.parametrize("order", ORDERS)
def test_an_arm_of_words(order):
    figures = words_arm(order, seed=5, steps=10)
    assert 1 < figures["loss"] < 5
    assert ("converted" in figures) == (order == "standard")
    if order == "standard":
        assert figures["converted"] != figures["loss"]


def test_the_splitting_orders_hold():
    checks = _splitting()
    assert [check.holds for check in checks] == [True] * 4
    assert [round(check.value) for check in checks] == [2, 4, 2, 2]


class Given:
    """Figures as arms give them."""

    def __init__(self, **losses):
        self.losses = losses

    def values(self, arm, figure):
        return self.losses[arm]

    def mean(self, arm, figure):
        return sum(self.losses[arm]) / len(self.losses[arm])


@pytest.mark.parametrize(
    ("ours", "holds"), [([1.0, 1.1, 1.0], True), ([2.01, 1.98, 2.02], True), ([2.1, 2.11, 2.09], False)]
)
def test_the_card_s_rule(ours, holds):
    """The wrong sign counts from one standard error on."""
    assert _card_rule("loss", Given(ours=ours, theirs=[2.0, 2.0, 2.0]), "ours", "theirs").holds is holds


def test_a_fresh_model_of_a_seed_is_the_same():
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(torch.cat([one.flatten() for one in flow_model("macaron").parameters()]))
    assert torch.equal(*weights)
