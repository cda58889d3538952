import pytest
import torch

from smalti.tokenizers.latent_statistics import channel_moments


def test_moments_of_a_stream():
    z = torch.randn(10, 3, 4, 5) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 1
    mean, variance = channel_moments(z.split(3))
    torch.testing.assert_close(mean, z.double().mean((0, 2, 3)))
    torch.testing.assert_close(variance, z.double().var((0, 2, 3), correction=0))
    with pytest.raises(ValueError, match="no latents"):
        channel_moments([])
