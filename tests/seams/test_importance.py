import pytest
import torch
from torch import nn

from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.seams.importance import activation, chance, magnitude, taylor
from smalti.seams.units import masked, read_units


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def call(model, t=0.5):
    generator = torch.Generator().manual_seed(1)
    cond = Cond(text=torch.randn(2, 3, 12, generator=generator), pooled=torch.randn(2, 10, generator=generator))
    return model(torch.randn(2, 4, 8, 8, generator=generator), torch.full((2,), t), cond)


def test_magnitude_is_the_norm_of_the_weights_of_a_unit(model):
    groups = {group.name: group for group in read_units(model)}
    found = magnitude(model, list(groups.values()))
    block = model.double_blocks[0]
    ffn = block.ffn
    neuron = torch.cat([ffn.proj_in.weight[5], ffn.proj_in.bias[5:6], ffn.proj_out.weight[:, 5]])
    assert found["double_blocks.0.ffn"][5] == pytest.approx(neuron.norm().item(), rel=1e-5)
    parts = []
    for part in (block.attn, block.attn_text):
        for start in (0, 16, 32):
            parts += [part.to_qkv.weight[start + 8 : start + 16], part.to_qkv.bias[start + 8 : start + 16]]
        parts.append(part.to_out.weight[:, 8:])
    head = torch.cat([part.flatten() for part in parts])
    assert found["double_blocks.0.attn"][1] == pytest.approx(head.norm().item(), rel=1e-5)
    assert head.numel() == groups["double_blocks.0.attn"].parameters(model)


def test_taylor_is_the_first_order_change_of_the_loss(model):
    """Neurons and heads enter linearly behind their reader, so that the product is half of that of all their weights
    only if the writers were linear, too; here it is checked against the gradients themselves."""
    groups = read_units(model, ("ffn",))
    losses = [lambda t=t: call(model, t).square().mean() for t in (0.2, 0.8)]
    found = taylor(model, groups, losses, threshold=0.0)
    ffn = model.double_blocks[0].ffn
    weights = [ffn.proj_in.weight, ffn.proj_in.bias, ffn.proj_out.weight]
    gradients = torch.autograd.grad(sum(loss() for loss in losses), weights)
    products = [weight * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    expected = (products[0].sum(1) + products[1] + products[2].sum(0)).abs()
    assert torch.allclose(found["double_blocks.0.ffn"], expected, rtol=1e-3, atol=1e-7)


def test_taylor_leaves_out_times_with_small_losses_and_the_weights_as_they_were(model):
    groups = read_units(model, ("ffn",))
    model.requires_grad_(False)
    large, small = (lambda: call(model, 0.2).square().mean()), (lambda: 1e-4 * call(model, 0.8).square().mean())
    both, one = taylor(model, groups, [large, small]), taylor(model, groups, [large])
    every = taylor(model, groups, [large, small], threshold=0.0)
    assert all(torch.equal(both[name], one[name]) for name in one)
    assert not all(torch.equal(every[name], one[name]) for name in one)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    with pytest.raises(UserError, match="no losses"):
        taylor(model, groups, [])


def test_activation_is_zero_for_units_that_are_masked(model):
    groups = read_units(model)
    masks = {group.name: (torch.arange(group.count) % 2).float() for group in groups}
    with masked(model, groups, masks):
        found = activation(model, groups, lambda: call(model))
    for group in groups:
        assert (found[group.name][0::2] == 0).all()
        assert (found[group.name][1::2] > 0).all()
        assert found[group.name].shape == (group.count,)


def test_chance_depends_on_its_seed_alone(model):
    groups = read_units(model)
    one, same, other = chance(groups, 1), chance(groups[:2], 1), chance(groups, 2)
    name = groups[0].name
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
