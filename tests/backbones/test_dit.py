"""DiT: its conditions, times by token, sizes."""

import pytest
import torch

from smalti.backbones.dit import DiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond

X = (2, 4, 6, 8)


def awake(**changes):
    config = {name: value for name, value in DiT.tiny().config.items() if not name.startswith("_")}
    model = DiT(**config | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_every_condition_matters():
    model, x, t = awake(), torch.randn(X), torch.rand(2)
    given = {"pooled": torch.randn(2, 10), "label": torch.tensor([0, 1])}
    base = model(x, t, Cond(**given))
    for name, tensor in given.items():
        assert not torch.allclose(model(x, t, Cond(**{**given, name: tensor + 1})), base, atol=1e-3), name
    none = model(x, t, Cond(pooled=given["pooled"]))
    assert torch.equal(none, model(x, t, Cond(pooled=given["pooled"], label=torch.tensor([3, 3]))))


def test_times_by_token():
    model, x, t, cond = awake(), torch.randn(X), torch.rand(2), Cond(pooled=torch.randn(2, 10))
    same = t[:, None].expand(2, 12)
    torch.testing.assert_close(model(x, same, cond), model(x, t, cond), rtol=1e-4, atol=1e-5)
    changed = same.clone()
    changed[:, 5] = 0.99
    assert not torch.allclose(model(x, changed, cond), model(x, t, cond), atol=1e-3)


def test_unconditional_and_sigma():
    model = awake(num_labels=0, pooled_dim=0, learn_sigma=True)
    assert model(torch.randn(X), torch.rand(2), Cond()).shape == (2, 8, 6, 8)


def test_gradient_checkpointing_gives_the_same_gradient():
    model, cond, t = awake(), Cond(pooled=torch.randn(2, 10)), torch.rand(2)
    x = torch.randn(X, requires_grad=True)
    (plain,) = torch.autograd.grad(model(x, t, cond).square().sum(), x)
    model.enable_gradient_checkpointing()
    runs = []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    (checkpointed,) = torch.autograd.grad(model(x, t, cond).square().sum(), x)
    torch.testing.assert_close(checkpointed, plain)
    assert len(runs) == 2


def test_compiles_without_graph_breaks():
    model, x, t, cond = awake(), torch.randn(X), torch.rand(2), Cond(pooled=torch.randn(2, 10))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, cond), model(x, t, cond), rtol=1e-4, atol=1e-5)


def test_refuses_what_does_not_fit():
    model, x, t = DiT.tiny(), torch.randn(X), torch.rand(2)
    with pytest.raises(UserError, match=r"needs cond\.pooled"):
        model(x, t, Cond())
    with pytest.raises(UserError, match=r"takes no cond\.pooled"):
        awake(pooled_dim=0)(x, t, Cond(pooled=torch.zeros(2, 10)))
    with pytest.raises(UserError, match="label"):
        awake(num_labels=0)(x, t, Cond(pooled=torch.zeros(2, 10), label=torch.zeros(2).long()))
    with pytest.raises(UserError, match=r"\(2, 12\)"):
        model(x, torch.rand(2, 5), Cond(pooled=torch.zeros(2, 10)))
    with pytest.raises(UserError, match="multiple of 4"):
        DiT(heads=1, head_dim=6)
