"""What an autoencoder learns: pixels from pixels, with a price on the information in its latents.

`loss = mean |p - p'| + squared * mean (p - p')^2 + kl * KL(posterior || N(0, 1)) / pixels`
(VAE, arXiv 1312.6114, eq. 10 for the divergence; its small weight, arXiv 2112.10752, section 3.1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.core.protocols import Batch, Generators, LossResult, TrainState
from smalti.core.seeds import randn


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture (B,), for pixels (B, 3, H, W) in [-1, 1]."""
    error = (a - b).float().square().mean((1, 2, 3)) / 4
    return -10 * error.clamp_min(1e-10).log10()


@dataclass(frozen=True)
class AutoencoderReconstruction:
    """Objective of a KL autoencoder; the batch's x0 are pixels (B, 3, H, W).

    Args:
        factor: pixels a latent along each side.
        latent_channels: channels of the latents.
        squared: weight of the squared error beside the absolute one.
        kl: weight of the divergence in nats for each pixel value.
    """

    factor: int
    latent_channels: int
    squared: float = 2.0
    kl: float = 2e-4

    def loss(self, denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """`denoiser` is the autoencoder: `(pixels, noise) -> Reconstruction`."""
        pixels = batch.x0
        shape = (len(pixels), self.latent_channels, *(side // self.factor for side in pixels.shape[-2:]))
        out = denoiser(pixels, randn(shape, generator, pixels.device))
        difference = out.pixels - pixels
        absolute, squared = difference.abs().mean(), difference.square().mean()
        divergence = 0.5 * (out.mean.square() + out.logvar.exp() - 1 - out.logvar).sum() / pixels.numel()
        loss = absolute + self.squared * squared + self.kl * divergence
        with torch.no_grad():
            metrics = {"psnr": psnr(out.pixels.clamp(-1, 1), pixels).mean(), "kl": divergence.detach()}
        return LossResult(loss, metrics)
