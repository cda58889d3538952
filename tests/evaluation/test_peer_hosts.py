"""The models of the comparison: the carried-over one computes what ours does, the random ones run."""

from dataclasses import replace

import pytest
import torch

from smalti.backbones.flux_weights import mmdit_to_flux
from smalti.backbones.mmdit import MMDiT
from smalti.core.protocols import Cond
from smalti.evaluation import peer_hosts
from smalti.evaluation.peer_hosts import LABEL_STEP, SMALL, emoji_host, flux_call, random_host, without_labels


@pytest.fixture
def labelled():
    """A model whose every weight matters."""
    model = MMDiT(in_channels=4, num_single=2, heads=2, head_dim=16, text_dim=12, pooled_dim=10, num_labels=3,
                  axes_dims_rope=(4, 6, 6))  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2)
    return model.eval()


@torch.no_grad()
def test_flux_computes_what_a_model_with_labels_and_masked_text_does(labelled):
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1:, 3:] = False
    cond = Cond(torch.randn(4, 5, 12), torch.randn(4, 10), mask, torch.tensor([0, 1, 2, 3]))
    x, t = torch.randn(4, 4, 3, 5), torch.linspace(0.1, 0.9, 4)
    moved = replace(cond, label=None, guidance=cond.label * LABEL_STEP)
    ours = labelled(x, t, cond)
    torch.testing.assert_close(without_labels(labelled)(x, t, moved), ours, rtol=1e-4, atol=1e-5)
    flux = mmdit_to_flux(without_labels(labelled)).eval()
    torch.testing.assert_close(flux_call(flux, x, t, moved), ours, rtol=1e-4, atol=1e-5)
    for changed in (replace(moved, guidance=moved.guidance.flip(0)), replace(moved, mask=None)):
        assert (flux_call(flux, x, t, changed) - ours).abs().max() > 1e-2


def test_emoji_ends_where_its_pipeline_ends(monkeypatch):
    host = emoji_host(3, torch.device("cpu"), steps=2)
    assert host.noise.shape == (3, 16, 8, 8)
    assert host.first(2).draw(host.model, 1).shape == (2, 16, 8, 8)
    monkeypatch.setattr(peer_hosts, "LABEL_STEP", 0.0)  # all labels become the first
    with pytest.raises(RuntimeError, match="from the pipeline"):
        emoji_host(3, torch.device("cpu"), steps=2, timed=3)


@pytest.mark.parametrize("name", SMALL)
def test_random_models_depend_on_their_condition(name):
    host = random_host(name, SMALL[name], torch.device("cpu"), torch.float32)
    drawn = host.draw(host.model, 1)
    assert drawn.shape == host.noise.shape
    assert torch.isfinite(drawn).all()
    changed = host.cond.map(lambda tensor: tensor + 1)
    assert not torch.equal(replace(host, cond=changed).draw(host.model, 1), drawn)
