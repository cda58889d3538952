import torch

from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.reconstruction import AutoencoderReconstruction, psnr
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(a, a + 0.2), torch.full((2,), 20.0))


def test_the_divergence_is_that_of_two_gaussians():
    model = ConvAutoencoder(factor=4, latent_channels=2, widths=(8, 8), encoder_blocks=(0, 0), decoder_blocks=(0, 0))
    pixels = torch.rand(3, 3, 8, 8) * 2 - 1
    mean, logvar = model.posterior(pixels)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / pixels.numel()
    batch = Batch(pixels, Cond(), torch.arange(3))
    results = {
        kl: AutoencoderReconstruction(4, 2, kl=kl).loss(model, batch, TrainState(), generators_for([1, 2, 3]))
        for kl in (0.0, 1.0)
    }
    torch.testing.assert_close(results[1.0].loss - results[0.0].loss, expected)
    torch.testing.assert_close(results[0.0].metrics["kl"], expected.detach())


def test_noise_belongs_to_the_sample():
    model = ConvAutoencoder(factor=4, latent_channels=2, widths=(8, 8), encoder_blocks=(0, 0), decoder_blocks=(0, 0))
    model.start_from_patches(torch.rand(4, 3, 8, 8))
    pixels, objective = torch.rand(2, 3, 8, 8), AutoencoderReconstruction(4, 2)
    both = objective.loss(model, Batch(pixels, Cond(), torch.arange(2)), TrainState(), generators_for([5, 6])).loss
    parts = [
        objective.loss(
            model, Batch(pixels[i : i + 1], Cond(), torch.arange(1)), TrainState(), generators_for([5 + i])
        ).loss
        for i in range(2)
    ]
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)
