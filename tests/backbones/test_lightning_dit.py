"""LightningDiT: a ladder of flags that begins at DiT."""

import pytest
import torch

from smalti.backbones.dit import DiT
from smalti.backbones.lightning_dit import LightningDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.nn.norm import RMSNorm
from smalti.nn.swiglu import SwiGLU

SHAPE = {"in_channels": 4, "patch_size": 2, "depth": 2, "heads": 2, "head_dim": 8, "num_labels": 3, "base_size": 4}
PLAIN = {"has_rms_norm": False, "has_swiglu": False, "has_rope": False}
FLAGS = ("has_rms_norm", "has_swiglu", "has_rope", "has_qk_norm", "is_fourier")
X = (2, 4, 6, 8)


def awake(**changes):
    torch.manual_seed(1)
    model = LightningDiT(**SHAPE | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_with_all_flags_off_it_is_a_dit():
    model = awake(**PLAIN)
    plain = DiT(**SHAPE)
    plain.load_state_dict({name.removeprefix("conditions."): one for name, one in model.state_dict().items()})
    x, t, cond = torch.randn(X), torch.rand(2), Cond(label=torch.tensor([0, 2]))
    assert torch.equal(model(x, t, cond), plain(x, t, cond))


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_changes_the_function(flag):
    x, t, cond = torch.randn(X), torch.rand(2), Cond(label=torch.tensor([0, 2]))
    plain, changed = awake(**PLAIN), awake(**PLAIN | {flag: True})
    own = {name: one for name, one in plain.state_dict().items() if name in changed.state_dict()}
    own = {name: one for name, one in own.items() if one.shape == changed.state_dict()[name].shape}
    changed.load_state_dict(own, strict=False)
    assert not torch.allclose(changed(x, t, cond), plain(x, t, cond), atol=1e-3)


def test_each_flag_has_its_parts():
    model = awake(has_qk_norm=True)
    assert isinstance(model.blocks[0].ffn, SwiGLU)
    assert isinstance(model.blocks[0].norms[1], RMSNorm)
    assert isinstance(model.blocks[0].attn.norm_k, RMSNorm)
    assert isinstance(model.final_norm.norm, RMSNorm)
    assert awake().blocks[0].attn.norm_q is None
    assert awake(has_shift=False).blocks[0].modulation.linear.out_features == 4 * 16
    assert awake().blocks[0].modulation.linear.out_features == 6 * 16


def test_without_a_shift_it_is_the_model_whose_shifts_are_zero():
    with_shift, without = awake(), awake(has_shift=False)
    weights = with_shift.state_dict()
    for name, tensor in weights.items():
        if ".modulation.linear" in name:
            parts = tensor.unflatten(0, (2, 3, -1))
            parts[:, 0] = 0.0
            weights[name] = tensor
    with_shift.load_state_dict(weights)
    narrow = {
        name: tensor.unflatten(0, (2, 3, -1))[:, 1:].flatten(0, 2) if ".modulation.linear" in name else tensor
        for name, tensor in weights.items()
    }
    without.load_state_dict(narrow)
    x, t, cond = torch.randn(X), torch.rand(2), Cond(label=torch.tensor([0, 2]))
    torch.testing.assert_close(without(x, t, cond), with_shift(x, t, cond))


def test_rotary_positions_tell_where_a_token_is_apart_from_the_added_ones(monkeypatch):
    from smalti.backbones import lightning_dit

    monkeypatch.setattr(lightning_dit, "grid_positions", lambda h, w, c, *_: torch.zeros(h * w, c))
    x, t, cond = torch.randn(X), torch.rand(2), Cond(label=torch.tensor([0, 2]))
    for has_rope in (False, True):
        model = awake(has_rope=has_rope, patch_size=1)
        moved = model(x.roll(1, -1), t, cond).roll(-1, -1)
        assert torch.allclose(moved, model(x, t, cond), atol=1e-4) != has_rope


def test_times_by_token():
    model, x, t, cond = awake(is_fourier=True), torch.randn(X), torch.rand(2), Cond(label=torch.tensor([0, 1]))
    same = t[:, None].expand(2, 12)
    torch.testing.assert_close(model(x, same, cond), model(x, t, cond), rtol=1e-4, atol=1e-5)
    changed = same.clone()
    changed[:, 5] = 0.99
    assert not torch.allclose(model(x, changed, cond), model(x, t, cond), atol=1e-3)


def test_a_fresh_model_predicts_zero_and_passes_tokens_through():
    model = LightningDiT(**SHAPE)
    x, t = torch.randn(X), torch.rand(2)
    assert not model(x, t, Cond()).any()


def test_refuses_what_does_not_fit():
    model, x, t = LightningDiT.tiny(), torch.randn(X), torch.rand(2)
    with pytest.raises(UserError, match=r"takes no cond\.pooled"):
        model(x, t, Cond(pooled=torch.zeros(2, 10)))
    with pytest.raises(UserError, match=r"needs cond\.pooled"):
        LightningDiT.tiny_pooled()(x, t, Cond())
    with pytest.raises(UserError, match="label"):
        awake(num_labels=0)(x, t, Cond(label=torch.zeros(2).long()))
    with pytest.raises(UserError, match=r"\(2, 12\)"):
        model(x, torch.rand(2, 5), Cond())
    with pytest.raises(UserError, match="multiple of 4"):
        LightningDiT(heads=2, head_dim=6)


def test_gradient_checkpointing_gives_the_same_gradient():
    model, t, cond = awake(), torch.rand(2), Cond(label=torch.tensor([0, 1]))
    x = torch.randn(X, requires_grad=True)
    (plain,) = torch.autograd.grad(model(x, t, cond).square().sum(), x)
    model.enable_gradient_checkpointing()
    (checkpointed,) = torch.autograd.grad(model(x, t, cond).square().sum(), x)
    torch.testing.assert_close(checkpointed, plain)
