"""The VF loss by its two formulas, its margins, and what it moves."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.training.va_vae_lightningdit import VFLoss, VFSettings, paper_phases


def seen(features):
    return Cond(extra={"teacher": features})


def test_both_terms_by_their_formulas():
    torch.manual_seed(0)
    latents, features = torch.randn(2, 3, 2, 2), torch.randn(2, 4, 5)
    term = VFLoss(3, 5, VFSettings(cos_margin=0.1, distance_margin=0.2))
    expected = 0.0
    for z, f in zip(latents.flatten(2).mT, features, strict=True):
        projected = z @ term.project.weight.T
        for i in range(4):
            cosine = torch.cosine_similarity(projected[i], f[i], dim=0)
            expected += (1 - 0.1 - cosine).clamp_min(0) / 8
            for j in range(4):
                apart = torch.cosine_similarity(projected[i], projected[j], dim=0)
                apart = (apart - torch.cosine_similarity(f[i], f[j], dim=0)).abs()
                expected += (apart - 0.2).clamp_min(0) / 32
    torch.testing.assert_close(term(latents, seen(features)), torch.as_tensor(expected))


def test_aligned_latents_cost_nothing_and_pairs_of_other_pictures_do_not_count():
    torch.manual_seed(0)
    term = VFLoss(3, 5)
    latents = torch.randn(3, 3, 4, 4)
    features = term.project(latents.flatten(2).mT).detach()
    assert term(latents, seen(features)) < 1e-5
    scaled = features * torch.tensor([1.0, 7.0, 0.1])[:, None, None]
    assert term(latents, seen(scaled)) < 1e-5


def test_margins_let_go():
    torch.manual_seed(0)
    latents, features = torch.randn(2, 3, 2, 2), torch.randn(2, 4, 5)
    free = VFLoss(3, 5, VFSettings(cos_margin=2.0, distance_margin=2.0))
    assert free(latents, seen(features)) == 0


def test_features_of_another_grid_are_resized_and_either_side_can_be_projected():
    torch.manual_seed(0)
    latents = torch.randn(2, 3, 4, 4, requires_grad=True)
    term = VFLoss(3, 5, VFSettings(projects="features"))
    assert term.project.weight.shape == (3, 5)
    term(latents, seen(torch.randn(2, 64, 5))).backward()
    assert latents.grad.abs().sum() > 0
    assert term.project.weight.grad.abs().sum() > 0


def test_phases_follow_the_step():
    phases = paper_phases(1300)
    assert list(phases) == [0, 1000, 1150]
    term = VFLoss(3, 5, phases[0], later={start: one for start, one in phases.items() if start})
    latents, features = torch.randn(2, 3, 2, 2), torch.randn(2, 4, 5)
    weights, values = [], []
    for step in (0, 999, 1000, 1149, 1150, 5000, 3):  # a resumed training may ask for any
        term.at(step)
        weights.append(term.weight)
        values.append(float(term(latents, seen(features)).detach()))
    assert weights == [0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.5]
    assert values[0] == values[3] == values[-1] > values[4] == values[5]  # margins let go
    assert set(term.settings["later"]) == {"1000", "1150"}
    assert "later" not in VFLoss(3, 5).settings
    with pytest.raises(UserError, match="too few"):
        paper_phases(20)
    with pytest.raises(UserError, match="cannot follow"):
        VFLoss(3, 5, later={0: VFSettings()})


def test_the_players_tell_the_step():
    from test_tokenizer import SMALL, Players, autoencoder

    term = VFLoss(4, 5, VFSettings(0.5), later={3: VFSettings(0.1)})
    model = Players(autoencoder(), SMALL, [term])
    pixels, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 4, 4)
    losses = [model(pixels, noise, seen(torch.randn(2, 16, 5)), step).metrics for step in (0, 3)]
    assert term.weight == 0.1
    assert all("vf" in one for one in losses)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no features 'teacher'"):
        VFLoss(3, 5)(torch.zeros(1, 3, 2, 2), Cond())
    with pytest.raises(UserError, match="square"):
        VFLoss(3, 5)(torch.zeros(1, 3, 2, 2), seen(torch.zeros(1, 6, 5)))
    with pytest.raises(UserError, match="margins"):
        VFSettings(cos_margin=3)
    with pytest.raises(UserError, match="latents"):
        VFSettings(projects="latent")
