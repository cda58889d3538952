"""Sine-cosine positions equal diffusers' on any grid."""

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from smalti.nn.positions import grid_positions


@pytest.mark.parametrize(("height", "width", "base"), [(4, 4, 4), (6, 6, 4), (3, 5, 8)])
def test_equals_diffusers(height, width, base):
    expected = get_2d_sincos_pos_embed(16, (height, width), base_size=base, output_type="pt")
    got = grid_positions(height, width, 16, base, torch.device("cpu"))
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-6)


def test_rows_and_columns_differ():
    positions = grid_positions(3, 2, 16, 8, torch.device("cpu")).unflatten(0, (3, 2))
    assert torch.equal(positions[0, :, 8:], positions[0, :1, 8:].expand(2, -1))
    assert len({tuple(row) for row in positions.flatten(0, 1).tolist()}) == 6
