"""The coordinate check sees what grows with the width, and only that."""

import pytest
import torch
from torch import nn

from smalti.training.coordinate_check import coordinate_check, slope
from smalti.training.mup import MuP

WIDTHS = (32, 64, 128, 256)


def build(width):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))


def loss(model, step):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
    return (model(x) - x[:, :2] * x[:, 2:]).square().mean()


def plain(width):
    model = build(width)
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def with_mup(width):
    mu = MuP(build, 32)
    model = mu.model(width)
    return model, torch.optim.AdamW(mu.groups(model, 1e-2))


def test_slopes_are_flat_with_mup_and_not_without():
    good, bad = (coordinate_check(make, loss, WIDTHS, steps=4, seeds=3) for make in (with_mup, plain))
    assert good.is_flat(0.15), good.slopes()
    assert not bad.is_flat(0.3)
    assert bad.steepest()[1] > 0.3
    assert set(good.slopes()) == {"0", "2", "4"}
    assert "4" not in good.slopes(step=0)  # a readout at zero gives nothing before the first update
    assert len(good.rows()) == 3 * 5 * 4


def test_hooks_are_taken_off_and_gradients_left_empty():
    kept = []

    def make(width):
        kept.append(with_mup(width))
        return kept[-1]

    coordinate_check(make, loss, (32, 64), steps=1)
    assert all(not layer._forward_hooks for model, _ in kept for layer in model.modules())
    assert all(one.grad is None for model, _ in kept for one in model.parameters())


def test_a_slope_is_that_of_the_logarithms():
    assert slope({2: 3.0, 4: 12.0, 8: 48.0}) == pytest.approx(2.0)
    assert slope({10: 5.0, 100: 5.0}) == pytest.approx(0.0)
