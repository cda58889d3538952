"""Experts choose their tokens: as the plain formula says, and by how many tokens there are now."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.evaluation.flops import count_flops
from smalti.nn.experts import ExpertChoice, experts_plain


@pytest.mark.parametrize(("tokens", "experts", "capacity"), [(7, 3, 1.0), (13, 4, 2.0), (5, 8, 2.0), (9, 2, 2.0)])
def test_equals_the_plain_formula_in_values_and_gradients(tokens, experts, capacity):
    layer = ExpertChoice(6, 10, experts, capacity)
    x = torch.randn(3, tokens, 6, requires_grad=True)
    found = []
    for out in (layer(x), experts_plain(layer, x)):
        gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        found.append((out, *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_capacity_follows_from_the_current_tokens():
    """The trap: a masked sample in training and a whole one in sampling have the same load a token."""
    layer = ExpertChoice(6, 10, experts=8, capacity=2.0)
    assert [layer.tokens_each(count) for count in (16, 64, 256)] == [4, 16, 64]
    loads = [count_flops(lambda n=n: layer(torch.randn(1, n, 6))).total / n for n in (16, 64)]
    assert loads[0] == loads[1]


def test_every_expert_is_equally_busy_and_a_token_may_be_nobody_s():
    layer = ExpertChoice(6, 10, experts=4, capacity=1.0)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = 5.0  # all experts like the same tokens
    x = torch.randn(1, 8, 6)
    out = layer(x)
    assert (out.abs().sum(-1) > 0).sum() >= layer.tokens_each(8)
    assert (out.abs().sum(-1) == 0).any()


def test_a_sample_s_choice_does_not_depend_on_its_batch():
    layer = ExpertChoice(6, 10, experts=4)
    x = torch.randn(4, 12, 6)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))


def test_experts_start_by_their_own_fan_in():
    layer = ExpertChoice(64, 128, experts=16)
    limit = (6 / (64 + 128)) ** 0.5
    for weights in (layer.weight_in, layer.weight_out):
        assert weights.abs().max() <= limit
        assert weights.std() > 0.5 * limit


@pytest.mark.parametrize("capacity", [0.0, 5.0])
def test_a_capacity_that_cannot_be_is_refused(capacity):
    with pytest.raises(UserError, match="capacity"):
        ExpertChoice(6, 10, experts=4, capacity=capacity)
