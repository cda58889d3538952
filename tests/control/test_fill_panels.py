"""Given panels as an input: a fresh model is the plain one, a trained one has looked at what is given."""

import pytest
import torch
from torch import nn

from smalti.backbones.dit import DiT
from smalti.control.channel_concat import ChannelConcat
from smalti.control.fill_panels import GIVEN, FillPanels, PanelChannels, with_given
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.ops.canvas import PanelLayout

LAYOUT = PanelLayout(1, 2)


def dit():
    model = DiT(in_channels=2, patch_size=2, depth=1, heads=2, head_dim=8)
    nn.init.normal_(model.proj_out.weight, std=0.3)
    return model


def filled(model):
    return ChannelConcat(model, [PanelChannels(2)])


def test_a_fresh_model_is_the_plain_one():
    model = dit().eval()
    x, t = torch.randn(3, 2, 4, 8), torch.rand(3)
    mask, plain = LAYOUT.mask([0], 4, 8)[None, None], model(x, t, Cond())
    fill = filled(model)
    cond = with_given(Cond(), torch.randn(3, 2, 4, 8), mask)
    assert torch.allclose(fill(x, t, cond), plain, atol=1e-6)
    nn.init.normal_(model.x_embedder.weight)
    seen = fill(x, t, cond)
    other = with_given(Cond(), torch.randn(3, 2, 4, 8), mask)
    assert not torch.allclose(fill(x, t, other), seen)


def test_what_is_to_be_drawn_is_not_told():
    x0, mask = torch.randn(2, 2, 4, 8), LAYOUT.mask([1], 4, 8)[None, None]
    given = with_given(Cond(), x0, mask).extra[GIVEN]
    assert torch.equal(given[:, :2, :, 4:], x0[..., 4:])
    assert not given[:, :2, :, :4].any()
    assert given[0, 2].bool().tolist() == mask[0, 0].tolist()


def test_every_sample_draws_its_given_panels_and_the_loss_counts_the_others():
    objective = FillPanels(PanelLayout(2, 2), none_given=0.2)
    masks = objective.masks(torch.zeros(400, 2, 4, 4), generators_for(range(400)))
    counts = masks.flatten(1).sum(1) // 4
    assert set(counts.tolist()) == {0, 1, 2, 3}
    assert 0.13 < float((counts == 0).double().mean()) < 0.28
    seen = {}

    def denoiser(x, t, cond):
        seen["mask"] = cond.extra[GIVEN][:, 2:].bool()
        return torch.where(seen["mask"], 100.0, 0.0).expand_as(x)  # errors where panels are given must not count

    batch = Batch(torch.zeros(8, 2, 4, 4), Cond(), torch.arange(8))
    loss = objective.loss(denoiser, batch, TrainState(), generators_for(range(8))).loss
    assert seen["mask"].any()
    assert 0.5 < float(loss) < 2  # the noise alone


def without(cond):
    return Cond(extra={GIVEN: torch.zeros_like(cond.extra[GIVEN])})


def test_it_learns_to_copy_what_is_given():
    """Both panels are equal, so a model that looks at the given one knows the other."""
    torch.manual_seed(0)
    fill, objective = filled(dit()), FillPanels(LAYOUT, none_given=0.0)
    optimizer = torch.optim.Adam(fill.parameters(), lr=3e-3)
    losses = {True: [], False: []}
    for step in range(300):
        panel = torch.randn(16, 2, 1, 1).expand(16, 2, 4, 4)
        batch = Batch(torch.cat([panel, panel], -1), Cond(), torch.arange(16))
        generators = generators_for(range(step * 16, step * 16 + 16))
        loss = objective.loss(fill, batch, TrainState(step), generators).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            blind = objective.loss(
                lambda x, t, cond: fill(x, t, without(cond)), batch, TrainState(), generators_for(range(16))
            )
            seeing = objective.loss(fill, batch, TrainState(), generators_for(range(16)))
        if step >= 280:
            losses[False].append(float(blind.loss))
            losses[True].append(float(seeing.loss))
    assert sum(losses[True]) < 0.8 * sum(losses[False])


def test_mistakes_are_named():
    with pytest.raises(UserError, match="share in"):
        FillPanels(LAYOUT, none_given=2.0)
    fill = filled(dit())
    with pytest.raises(UserError, match="as with_given makes them"):
        fill(torch.zeros(1, 2, 4, 8), torch.ones(1), Cond(extra={GIVEN: torch.zeros(1, 2, 4, 8)}))
