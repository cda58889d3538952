import pytest
import torch

from smalti.tokenizers.latent_statistics import channel_moments, element_moments


def test_moments_of_a_stream():
    z = torch.randn(10, 3, 4, 5) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 1
    mean, variance = channel_moments(z.split(3))
    torch.testing.assert_close(mean, z.double().mean((0, 2, 3)))
    torch.testing.assert_close(variance, z.double().var((0, 2, 3), correction=0))
    with pytest.raises(ValueError, match="no latents"):
        channel_moments([])


def test_element_moments_are_those_of_each_place_however_latents_are_cut():
    z = torch.randn(12, 3, 2, 2) * 2 + torch.randn(3, 2, 2)
    mean, variance = element_moments([z[:5], z[5:]])
    torch.testing.assert_close(mean, z.double().mean(0))
    torch.testing.assert_close(variance, z.double().var(0, correction=0))
    with pytest.raises(ValueError, match="no latents"):
        element_moments([])
