"""Projector, grids and cosine of feature alignments."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.training.feature_alignment import cosine, match, projector


def test_equal_directions_give_the_minimum():
    features = torch.randn(2, 6, 5)
    assert cosine(3 * features, features).item() == pytest.approx(1.0, abs=1e-6)
    assert cosine(-features, features).item() == pytest.approx(-1.0, abs=1e-6)
    assert cosine(features.bfloat16(), features).dtype == torch.float32


def test_the_projector_has_three_layers_with_biases():
    layers = [one for one in projector(8, 32, 5) if isinstance(one, torch.nn.Linear)]
    assert [(one.in_features, one.out_features) for one in layers] == [(8, 32), (32, 32), (32, 5)]
    assert all(one.bias is not None for one in layers)


def test_grids_are_matched_by_place():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    features = torch.stack([rows, columns], -1).flatten(0, 1)[None]  # (1, 64, 2)
    small = match(features, None, (1, 4, 4)).unflatten(1, (4, 4))[0]
    assert (small[1:, :, 0] > small[:-1, :, 0]).all()
    assert torch.allclose(small[:, 1:, 0], small[:, :1, 0].expand(-1, 3), atol=1e-5)
    assert torch.equal(match(features, None, (1, 8, 8)), features)
    two = match(torch.cat([features, features + 100], 1), (8, 8), (2, 4, 4))
    assert torch.allclose(two[:, 16:], two[:, :16] + 100, atol=1e-4)
    with pytest.raises(UserError, match="give the grid"):
        match(features[:, :60], None, (1, 4, 4))
