"""Looks: they tell hands apart, not places."""

import torch

from smalti.evaluation.style_features import style_features
from smalti.evaluation.vgg import VGG16


def disc(row, column, shaded):
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    inside = ((rows - row) ** 2 + (columns - column) ** 2 < 64).float()
    tone = (rows - row) / 16 if shaded else torch.full_like(rows, 0.2)
    return (inside * tone + (1 - inside)).expand(3, -1, -1)


def test_a_shift_changes_looks_less_than_shading():
    network = VGG16()
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.data.normal_(0, 0.1, generator=generator)
    pictures = torch.stack([disc(12, 12, False), disc(18, 20, False), disc(12, 12, True), disc(18, 20, True)])
    features = style_features(network, pictures)
    assert features.shape[0] == 4
    assert torch.isfinite(features).all()
    apart = torch.cdist(features, features)
    assert apart[0, 1] < 0.5 * apart[0, 2]
    assert apart[2, 3] < 0.5 * apart[1, 3]
    assert torch.allclose(features, torch.cat([style_features(network, one[None]) for one in pictures]), atol=1e-4)


def test_an_empty_picture_has_finite_looks():
    assert torch.isfinite(style_features(VGG16(), torch.ones(1, 3, 32, 32))).all()
