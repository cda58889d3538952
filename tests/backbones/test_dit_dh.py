"""DiT^DH: a head that is modulated token by token, states that may be reused, and the width that it is there for."""

import pytest
import torch

from smalti.backbones.dit_dh import DiTDH, SharedStates
from smalti.backbones.lightning_dit import LightningDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.sampling.guidance import Guidance, bind

X = (2, 12, 4, 4)


def awake(**changes):
    config = {name: one for name, one in DiTDH.tiny().config.items() if not name.startswith("_")}
    torch.manual_seed(1)
    model = DiTDH(**config | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_the_head_is_modulated_token_by_token():
    model = awake()
    x, t, cond = torch.randn(X), torch.rand(2), Cond(label=torch.tensor([0, 2]))
    states = model.states(x, t, cond)
    assert states.shape == (2, 16, 16)
    assert not torch.allclose(states[:, 0], states[:, 5], atol=1e-3)
    mean = states.mean(1, keepdim=True).expand_as(states)
    assert not torch.allclose(model.velocity(x, mean), model.velocity(x, states), atol=1e-3)
    seen = []
    model.head[0].modulation.register_forward_hook(lambda _, given, triples: seen.append(triples[0].shift.shape))
    model.blocks[0].modulation.register_forward_hook(lambda _, given, triples: seen.append(triples[0].shift.shape))
    model(x, t, cond)
    assert seen == [(2, 1, 8), (2, 16, 16)]


def test_both_parts_read_the_noisy_latents_and_only_the_deep_one_the_label():
    model = awake()
    x, t, cond = torch.randn(X), torch.rand(2), Cond(label=torch.tensor([0, 2]))
    states = model.states(x, t, cond)
    assert not torch.allclose(model.velocity(x + 1, states), model.velocity(x, states), atol=1e-3)
    assert not torch.allclose(model.states(x, t, Cond(label=torch.tensor([1, 2])))[0], states[0], atol=1e-3)
    assert not torch.allclose(model.states(x, 1 - t, cond), states, atol=1e-3)


def test_shared_states_run_the_deep_part_once_in_so_many_calls_of_each_branch():
    model, runs = awake(), []
    model.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    x, cond, uncond = torch.randn(X), Cond(label=torch.tensor([0, 2])), Cond(label=torch.tensor([3, 3]))
    guidance = Guidance(2.0, is_batched=False)
    plain = bind(model, cond, uncond, guidance)
    expected = plain(x, 0.9)
    runs.clear()
    shared = bind(SharedStates(model, every=2), cond, uncond, guidance)
    assert torch.equal(shared(x, 0.9), expected)
    second = shared(x + 0.1, 0.8)
    assert len(runs) == 2  # one for each branch
    assert not torch.allclose(second, expected)
    assert not torch.allclose(second, plain(x + 0.1, 0.8), atol=1e-4)
    shared(x, 0.7)
    assert len(runs) == 2 + 2 + 2
    alone = bind(SharedStates(model, every=1), cond)
    assert torch.equal(alone(x, 0.9), bind(model, cond)(x, 0.9))
    assert torch.equal(alone(x, 0.8), bind(model, cond)(x, 0.8))


def fit_one(model, steps, channels=16):
    """The loss on one picture of random latents after so many steps, over the last fifth of them."""
    torch.manual_seed(0)
    x0, cond = torch.randn(1, channels, 4, 4).expand(32, -1, -1, -1), Cond()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        noise, t = torch.randn(x0.shape), torch.rand(32)
        xt = x0 + t[:, None, None, None] * (noise - x0)
        loss = (model(xt, t, cond) - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-steps // 5 :]) / (steps // 5)


def test_a_model_narrower_than_its_tokens_cannot_fit_one_picture_and_a_wide_head_can():
    narrow = LightningDiT(in_channels=16, depth=2, heads=1, head_dim=4, base_size=4)
    headed = DiTDH(in_channels=16, width=(4, 32), depth=(2, 2), heads=(1, 2), base_size=4)
    assert fit_one(narrow, 250) > 0.7  # 1 - 4 / 16 does not pass
    assert fit_one(headed, 250) < 0.35


def test_refuses_what_does_not_fit():
    with pytest.raises(UserError, match="do not fit"):
        DiTDH(width=(6, 16), heads=(1, 2))
    with pytest.raises(UserError, match="at least 1"):
        SharedStates(DiTDH.tiny(), 0)
    with pytest.raises(UserError, match="label"):
        awake(num_labels=0)(torch.randn(X), torch.rand(2), Cond(label=torch.zeros(2).long()))
    with pytest.raises(UserError, match=r"\(2, 16\)"):
        awake()(torch.randn(X), torch.rand(2, 5), Cond())


def test_the_papers_largest_one_has_the_papers_size():
    from smalti.backbones.dit_dh import SHAPES

    with torch.device("meta"):
        model = DiTDH(**SHAPES["xl"], num_labels=1000)
    assert 800e6 < sum(one.numel() for one in model.parameters()) < 880e6  # 839 M in the paper's table
