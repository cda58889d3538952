"""Embeddings of time and labels."""

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from smalti.core.errors import UserError
from smalti.nn.embeddings import FourierTimeEmbedder, LabelEmbedder, TimeEmbedder, sinusoidal


@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoidal_equals_diffusers(shift):
    t = torch.tensor([0.0, 0.1234, 1.0])
    expected = get_timestep_embedding(t * 1000, 64, flip_sin_to_cos=True, downscale_freq_shift=shift)
    torch.testing.assert_close(sinusoidal(t, 64, shift), expected, rtol=0, atol=1e-6)


def test_times_by_token():
    embedder = TimeEmbedder(8)
    t = torch.rand(2, 5)
    torch.testing.assert_close(embedder(t)[1], embedder(t[1]))
    assert embedder.bfloat16()(t).dtype == torch.bfloat16


def test_no_label_is_the_last_row():
    embedder = LabelEmbedder(3, 8)
    assert torch.equal(embedder(None, 2), embedder(torch.tensor([3, 3]), 2))
    assert not torch.equal(embedder(None, 1), embedder(torch.tensor([0]), 1))
    with pytest.raises(UserError, match="long"):
        embedder(torch.tensor([0.0]), 1)


def test_random_frequencies_stay_and_tell_times_apart():
    torch.manual_seed(3)
    embedder = FourierTimeEmbedder(8, frequencies=64)
    assert "frequencies" in embedder.state_dict()
    assert all(not name.startswith("frequencies") for name, _ in embedder.named_parameters())
    assert 0.8 < embedder.frequencies.std() < 1.2
    out = embedder(torch.linspace(0, 1, 5))
    assert out.shape == (5, 8)
    assert torch.pdist(out).min() > 1e-3
