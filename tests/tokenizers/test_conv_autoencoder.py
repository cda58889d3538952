import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, Latents, TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.reconstruction import AutoencoderReconstruction, psnr
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder

SMALL = {"factor": 4, "latent_channels": 6, "widths": (8, 16), "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)}


@pytest.fixture
def pictures() -> torch.Tensor:
    """Smooth random pictures, which a few components describe well."""
    coarse = torch.rand(64, 3, 4, 4) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(24, 16), mode="bicubic").clamp(-1, 1)


def test_untrained_it_is_the_best_linear_autoencoder(pictures):
    model = ConvAutoencoder(**SMALL)
    model.start_from_patches(pictures)
    patches = torch.nn.functional.pixel_unshuffle(pictures.double(), 4).flatten(2).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    _, _, basis = torch.linalg.svd(patches - mean, full_matrices=False)
    best = (patches - mean) @ basis[:6].T @ basis[:6] + mean
    ours = (
        torch.nn.functional.pixel_unshuffle(model(pictures).pixels.double(), 4).flatten(2).transpose(1, 2).flatten(0, 1)
    )
    torch.testing.assert_close(ours, best, atol=1e-4, rtol=0)


def test_latents_leave_normalised_and_come_back(pictures):
    model = ConvAutoencoder(**SMALL).eval()
    model.start_from_patches(pictures)
    raw = model.reconstruct(model.posterior(pictures)[0]).clamp(-1, 1)
    model.measure_statistics(pictures.split(16))
    latents = model.encode(pictures)
    assert latents.tensor.shape == (64, 6, 6, 4)
    assert latents.tensor.mean((0, 2, 3)).abs().max() < 1e-4
    assert abs(latents.tensor.std() - 1) < 0.02
    torch.testing.assert_close(model.decode(Latents(latents.tensor)), raw, atol=1e-4, rtol=0)


def test_statistics_travel_with_the_weights(pictures, tmp_path):
    model = ConvAutoencoder(**SMALL).eval()
    model.start_from_patches(pictures)
    model.measure_statistics([pictures])
    model.save_pretrained(tmp_path)
    again = ConvAutoencoder.from_pretrained(tmp_path).eval()
    assert torch.equal(again.encode(pictures).tensor, model.encode(pictures).tensor)
    assert not torch.equal(again.latents_mean, torch.zeros(6))


def test_drawing_from_the_posterior_does_not_depend_on_the_batch(pictures):
    model = ConvAutoencoder(**SMALL).eval()
    together = model.encode(pictures[:3], generator=generators_for([1, 2, 3])).tensor
    alone = model.encode(pictures[1:2], generator=generators_for([2])).tensor
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=0)
    assert not torch.equal(together, model.encode(pictures[:3]).tensor)


def test_training_improves_it(pictures):
    torch.manual_seed(1)
    model = ConvAutoencoder(**SMALL)
    model.start_from_patches(pictures)
    objective = AutoencoderReconstruction(4, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = psnr(model(pictures).pixels, pictures).mean()
    for step in range(60):
        batch = Batch(pictures, Cond(), torch.arange(64))
        result = objective.loss(
            lambda x, noise: model(x, noise), batch, TrainState(), torch.Generator().manual_seed(step)
        )
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    assert psnr(model(pictures).pixels, pictures).mean() > before + 1
    assert set(result.metrics) == {"psnr", "kl"}


def test_sizes_and_settings_that_do_not_fit():
    with pytest.raises(UserError, match="multiples of 4"):
        ConvAutoencoder(**SMALL).encode(torch.zeros(1, 3, 10, 8))
    with pytest.raises(UserError, match="power of two"):
        ConvAutoencoder(factor=6)
    with pytest.raises(UserError, match="one entry for each halving"):
        ConvAutoencoder(factor=8, widths=(8, 8))
