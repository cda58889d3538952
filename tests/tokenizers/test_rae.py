"""RAE: clean statistics at every place, noise in training alone, twice the size from the same latents."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Latents, Tokenizer
from smalti.tokenizers.rae import RAE
from smalti.zoo.loader import load_part, save_part


def rae(**changes):
    torch.manual_seed(0)
    return RAE(**{"encoder": "random", "depth": 1, "width": 8, "heads": 2} | changes)


def pictures(count=24):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_latents_have_zero_mean_and_unit_variance_at_every_place():
    model, pixels = rae(), pictures()
    assert isinstance(model, Tokenizer)
    model.measure_statistics([pixels[:10], pixels[10:]])
    latents = model.encode(pixels).tensor
    assert latents.shape == (24, 192, 8, 8)
    assert latents.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(latents.var(0, correction=0), torch.ones(192, 8, 8), rtol=0.05, atol=0.05)
    z = model.encoder(pixels)
    by_channel = z - z.mean((0, 2, 3), keepdim=True)  # a mean for each channel alone leaves what a place has of its own
    assert by_channel.mean(0).abs().max() > 0.05
    torch.testing.assert_close(model.denormalise(latents), z, rtol=1e-4, atol=1e-4)


def test_noise_comes_in_training_alone_and_before_the_normalisation():
    model, pixels = rae(), pictures(2)
    model.measure_statistics([pictures()])
    clean = model.encode(pixels).tensor
    model.train()
    assert torch.equal(model.encode(pixels).tensor, clean)
    assert not model.encoder.teacher.training
    noise = 0.5 * torch.randn(2, 192, 8, 8)
    out = model(pixels, noise)
    torch.testing.assert_close(out.pixels, model.decoder(model.encoder(pixels) + noise))
    assert not torch.allclose(out.pixels, model(pixels).pixels, atol=1e-4)
    assert torch.equal(out.mean, model(pixels).mean)


def test_decoding_inverts_the_normalisation():
    model, pixels = rae(), pictures(2)
    model.measure_statistics([pictures()])
    expected = model(pixels).pixels.detach().clamp(-1, 1)
    torch.testing.assert_close(model.decode(model.encode(pixels)), expected, rtol=1e-3, atol=1e-3)


def test_the_encoder_is_frozen_not_saved_and_read_again_by_name(tmp_path):
    model, pixels = rae(encoder="vit-self"), pictures(2)
    model.measure_statistics([pictures()])
    assert not any("encoder" in name for name in model.state_dict())
    assert all(not one.requires_grad for one in model.encoder.parameters())
    again = load_part(save_part(model, tmp_path / "rae"), RAE)
    assert torch.equal(again.encode(pixels).tensor, model.encode(pixels).tensor)
    assert torch.equal(again.decode(again.encode(pixels)), model.decode(model.encode(pixels)))


def test_the_same_latents_are_painted_at_twice_the_size():
    small, large = rae(), rae(factor=16)
    pixels = torch.rand(1, 3, 128, 128) * 2 - 1
    latents = large.encode(pixels)
    assert latents.tensor.shape == (1, 192, 8, 8)
    assert large.decode(latents).shape == (1, 3, 128, 128)
    assert torch.equal(small.encode(pixels).tensor, latents.tensor)
    assert small.decode(Latents(latents.tensor)).shape == (1, 3, 64, 64)


def test_another_width_is_refused():
    with pytest.raises(UserError, match="gives 192 channels, not 768"):
        rae(latent_channels=768)
