"""Extraction of latents: unit channels, two views, and statistics that travel with the weights."""

import pytest
import torch

from smalti.core.protocols import Latents
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.training.latent_extraction import extract_latents, measure_channels


class Noise:
    """Pictures whose channels are of different strengths."""

    def __init__(self):
        strengths = torch.tensor([0.9, 0.3, 0.1])[:, None, None]
        self.table = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * strengths

    def __len__(self):
        return len(self.table)

    def pixels(self, indices):
        return self.table[list(indices)]


@pytest.fixture
def model(tiny_autoencoder):
    return ConvAutoencoder.from_pretrained(tiny_autoencoder, torch_dtype=torch.float32).eval()


def test_every_channel_has_unit_deviation_and_pictures_come_back(model, tmp_path):
    pictures = Noise()
    model.measure_statistics([pictures.table])
    before = model.decode(model.encode(pictures.table[:4]))
    measure_channels(model, [pictures.table[:20], pictures.table[20:]])
    plain, flipped = extract_latents(model, pictures, "noise", tmp_path)
    latents = plain[torch.arange(40)]
    assert torch.allclose(latents.transpose(0, 1).flatten(1).std(1), torch.ones(16), atol=0.02)
    assert torch.allclose(latents.transpose(0, 1).flatten(1).mean(1), torch.zeros(16), atol=0.02)
    assert torch.allclose(model.decode(model.encode(pictures.table[:4])), before, atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    again = ConvAutoencoder.from_pretrained(tmp_path / "model", torch_dtype=torch.float32).eval()
    assert torch.allclose(again.decode(Latents(latents[:4])), before, atol=2e-2)  # float16 on disk
    mirrored = model.encode(pictures.table[:4].flip(-1)).tensor
    assert torch.allclose(flipped[torch.arange(4)], mirrored, atol=5e-3)
    assert len(extract_latents(model, pictures, "noise", tmp_path, flips=False)) == 1


def test_other_statistics_are_another_table(model, tmp_path):
    pictures = Noise()
    measure_channels(model, [pictures.table])
    first = extract_latents(model, pictures, "noise", tmp_path, flips=False)[0][torch.arange(4)]
    measure_channels(model, [0.5 * pictures.table])
    second = extract_latents(model, pictures, "noise", tmp_path, flips=False)[0][torch.arange(4)]
    assert not torch.allclose(first, second, atol=0.1)
