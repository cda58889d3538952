"""Methods and taps at attention cores while gradients flow, one call at a time."""

import copy

import pytest
import torch
from torch import nn

import smalti
from smalti.acceleration.clear import CLEAR, PoolWeights
from smalti.acceleration.grat import GRAT
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.core.protocols import Cond
from smalti.seams.core_taps import CoreTaps


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def inputs(batch=2, seed=0):
    torch.manual_seed(seed)
    cond = Cond(text=torch.randn(batch, 5, 12), pooled=torch.randn(batch, 10))
    return torch.randn(batch, 4, 12, 12), torch.rand(batch), cond


def test_a_call_is_what_apply_computes_and_leaves_no_trace(model):
    given, before = inputs(), {name: set(vars(one)) for name, one in model.named_modules()}
    with torch.no_grad(), smalti.apply(model, CLEAR(2)):
        expected = model(*given)
    tapped = CoreTaps(model, [CLEAR(2)], "single[::1]")
    assert torch.equal(tapped(*given).velocity, expected)
    assert torch.equal(CoreTaps(model)(*given).velocity, model(*given))
    assert {name: set(vars(one)) for name, one in model.named_modules()} == before
    assert nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_a_tap_is_the_raw_output_before_the_projection(model):
    seen = []
    hook = model.single_blocks[1].attn.to_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    taken = CoreTaps(model, [CLEAR(2)], "single[1:]")(*inputs()).attended
    hook.remove()
    assert list(taken) == ["single_blocks.1.attn"]
    assert taken["single_blocks.1.attn"].shape == (2, 2, 5 + 36, 8)
    # Layouts are read in passes of their own before; the last one is the call.
    assert torch.equal(taken["single_blocks.1.attn"].transpose(1, 2).flatten(2), seen[-1])


def test_each_call_has_its_own_taps(model):
    tapped = CoreTaps(model, taps="single[:1]+double[::1]")
    one, other = tapped(*inputs(seed=0)), tapped(*inputs(seed=1))
    assert list(one.attended) == ["double_blocks.0.attn", "single_blocks.0.attn"]
    assert all(not torch.equal(one.attended[site], other.attended[site]) for site in one.attended)
    assert torch.equal(one.attended["single_blocks.0.attn"], tapped(*inputs(seed=0)).attended["single_blocks.0.attn"])


def test_gradients_reach_the_model_and_the_weights_of_the_method(model):
    weights = PoolWeights.of(model, 2)
    tapped = CoreTaps(model, [CLEAR(2, 2, weights=weights, backend="dense")], "single[::1]")
    output = tapped(*inputs())
    (output.velocity.square().sum() + sum(one.square().sum() for one in output.attended.values())).backward()
    assert all(one.grad.abs().sum() > 0 for one in tapped.parts.parameters())
    assert model.single_blocks[0].attn.to_qkv.weight.grad.abs().sum() > 0


def test_checkpointed_gradients_are_the_same_and_nothing_is_tapped_twice(model):
    found = []
    for is_checkpointed in (False, True):
        tapped = CoreTaps(copy.deepcopy(model), [CLEAR(2, backend="dense")], "single[::1]").train()
        if is_checkpointed:
            tapped.enable_gradient_checkpointing()
        output = tapped(*inputs())
        taken = dict(output.attended)
        output.velocity.square().sum().backward()
        assert output.attended == taken
        found.append([one.grad for one in tapped.denoiser.parameters() if one.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found, strict=True))
    plain = CoreTaps(copy.deepcopy(model)).train()
    plain(*inputs()).velocity.square().sum().backward()
    others = [one.grad for one in plain.denoiser.parameters() if one.grad is not None]
    assert not all(torch.allclose(a, b, atol=1e-2) for a, b in zip(found[1], others, strict=True))


def test_a_copy_has_its_own_model_and_weights(model):
    tapped = CoreTaps(model, [CLEAR(2, 2, weights=PoolWeights.of(model, 2))])
    tapped(*inputs())
    other = copy.deepcopy(tapped)
    (method,) = other.methods
    assert method.weights is other.parts[0] is not tapped.parts[0]
    with torch.no_grad():
        for one in other.parameters():
            one.zero_()
    assert other(*inputs()).velocity.abs().max() == 0
    assert tapped(*inputs()).velocity.abs().max() > 0


def test_what_cannot_be_is_refused(model):
    with pytest.raises(Refusal, match="elsewhere than on attention cores"):
        CoreTaps(model, [TaylorSeer()])
    with pytest.raises(Refusal, match="takes no gradients"):
        CoreTaps(model, [GRAT((1, 2, 2), "block:0")])(*inputs())
    with pytest.raises(NeverEngaged, match="changed nothing"):
        CoreTaps(model, [CLEAR(radius=50)])(*inputs())
    for taps in ("single", "triple[::2]", "single[5:]", "single[x]", "single[1]"):
        with pytest.raises(UserError, match=r"double_blocks of 1, single_blocks of 2"):
            CoreTaps(model, taps=taps)
