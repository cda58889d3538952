"""KL autoencoder whose starting point is the principal components of image patches.

Encoder and decoder are a linear map of `factor` x `factor` patches plus a convolutional correction that begins at zero:

    mean = P (patch - m) + E(pixels),     pixels = P^T z + m + D(z)

With P from the principal components of the training pictures (`start_from_patches`) the untrained model is already the
best linear autoencoder of its size; training only has to learn what a linear map cannot do. The posterior is a
diagonal Gaussian (VAE, arXiv 1312.6114; its use for latent diffusion, arXiv 2112.10752).

Latents leave normalised: `(z - latents_mean) / latents_std`, and both vectors live in the weights file.
`factor` 4 or 8 pixels a latent; shapes: pixels (B, 3, H, W) in [-1, 1], latents (B, C, H/factor, W/factor).
"""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from smalti.core.errors import UserError
from smalti.core.protocols import Generators, Latents, TensorBundle
from smalti.core.seeds import randn
from smalti.tokenizers.latent_statistics import channel_moments

STARTING_LOGVAR = -5.0


@dataclass(frozen=True)
class Reconstruction(TensorBundle):
    """What training sees: pixels (B, 3, H, W), posterior mean and logvar (B, C, h, w) before normalisation."""

    pixels: Tensor
    mean: Tensor
    logvar: Tensor


class _ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; the second starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        return x + self.conv2(functional.silu(self.norm2(h)))


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class ConvAutoencoder(ModelMixin, ConfigMixin):
    """A small KL autoencoder.

    Args:
        factor: pixels a latent along each side, a power of two of at least 4.
        latent_channels: C of the latents.
        widths: channels at half resolution and at each halving after it; log2(factor) values.
        encoder_blocks, decoder_blocks: residual blocks at each of these resolutions, finest first.

    Raises:
        UserError: the lists do not fit the factor.
    """

    @register_to_config
    def __init__(
        self,
        factor: int = 8,
        latent_channels: int = 16,
        widths: tuple[int, ...] = (48, 96, 192),
        encoder_blocks: tuple[int, ...] = (1, 1, 1),
        decoder_blocks: tuple[int, ...] = (1, 2, 2),
    ):
        super().__init__()
        levels = factor.bit_length() - 1
        if factor < 4 or 2**levels != factor or not len(widths) == len(encoder_blocks) == len(decoder_blocks) == levels:
            raise UserError(
                f"autoencoder of factor {factor} with widths {tuple(widths)}: the factor is a power of two from 4, "
                f"and widths and blocks have one entry for each halving"
            )
        self.factor, self.latent_channels = factor, latent_channels
        patch = 3 * factor**2
        self.to_latent = nn.Conv2d(3, latent_channels, factor, stride=factor)
        self.to_patch = nn.Conv2d(latent_channels, patch, 1)

        down: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
        for level in range(levels):
            if level:
                down += [nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[level - 1], widths[level], 1)]
            down += [_ResidualBlock(widths[level]) for _ in range(encoder_blocks[level])]
        down += [
            nn.GroupNorm(8, widths[-1]),
            nn.SiLU(),
            _zero(nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)),
        ]
        self.encoder = nn.Sequential(*down)

        up: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1)]
        for level in reversed(range(levels)):
            up += [_ResidualBlock(widths[level]) for _ in range(decoder_blocks[level])]
            if level:
                up += [nn.Conv2d(widths[level], 4 * widths[level - 1], 1), nn.PixelShuffle(2)]
        up += [nn.GroupNorm(8, widths[0]), nn.SiLU(), _zero(nn.Conv2d(widths[0], 12, 3, padding=1)), nn.PixelShuffle(2)]
        self.decoder = nn.Sequential(*up)

        self.register_buffer("latents_mean", torch.zeros(latent_channels))
        self.register_buffer("latents_std", torch.ones(latent_channels))

    @torch.no_grad()
    def start_from_patches(self, pixels: Tensor) -> None:
        """Sets the linear maps to the principal components of the patches of `pixels` (B, 3, H, W).

        Components are scaled by the inverse root of their deviation: half way between keeping the picture's
        metric and whitening, so that fine detail is neither drowned in noise nor as loud as the outline.
        """
        patches = functional.pixel_unshuffle(pixels.double(), self.factor).flatten(2).transpose(1, 2).flatten(0, 1)
        mean = patches.mean(0)  # (3 * factor^2,)
        variance, basis = torch.linalg.eigh((patches - mean).T.cov())
        basis = basis[:, -self.latent_channels :].flip(1)  # (3 * factor^2, C), strongest first
        deviation = variance[-self.latent_channels :].flip(0).clamp_min(1e-8).sqrt()
        scale = deviation.sqrt() / deviation.sum().div(len(deviation)).sqrt()
        scale = scale / deviation  # mean square of the scaled components is about one
        forward = (basis * scale).T.reshape(self.latent_channels, 3, self.factor, self.factor)
        self.to_latent.weight.copy_(forward)
        self.to_latent.bias.copy_(-(mean @ basis) * scale)  # type: ignore[union-attr]
        self.to_patch.weight.copy_((basis / scale)[..., None, None])
        self.to_patch.bias.copy_(mean)  # type: ignore[union-attr]

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, C, h, w) of the unnormalised latents of pixels (B, 3, H, W) in [-1, 1]."""
        if pixels.shape[-1] % self.factor or pixels.shape[-2] % self.factor:
            raise UserError(
                f"picture of {tuple(pixels.shape[-2:])} pixels: both sides must be multiples of {self.factor}"
            )
        correction, logvar = self.encoder(pixels).chunk(2, dim=1)
        return self.to_latent(pixels) + correction, (logvar + STARTING_LOGVAR).clamp(-20, 10)

    def reconstruct(self, z: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) of unnormalised latents (B, C, h, w), not clamped."""
        return functional.pixel_shuffle(self.to_patch(z), self.factor) + self.decoder(z)

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Encodes, draws from the posterior with `noise` (B, C, h, w) if given, and decodes."""
        mean, logvar = self.posterior(pixels)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return Reconstruction(self.reconstruct(z), mean, logvar)

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, generator: Generators | None = None) -> Latents:
        """Normalised latents of pixels (B, 3, H, W) in [-1, 1]: the posterior mean, or a draw with a generator."""
        mean, logvar = self.posterior(pixels)
        z = mean
        if generator is not None:
            z = mean + (0.5 * logvar).exp() * randn(mean.shape, generator, mean.device).to(mean.dtype)
        return Latents(self.normalise(z), statistics={"mean": mean, "logvar": logvar})

    @torch.no_grad()
    def decode(self, latents: Latents, *, generator: Generators | None = None, **context) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] of normalised latents; nothing else is used."""
        return self.reconstruct(self.denormalise(latents.tensor)).clamp(-1, 1)

    def normalise(self, z: Tensor) -> Tensor:
        """Latents of about zero mean and unit variance."""
        return (z - self.latents_mean[:, None, None]) / self.latents_std[:, None, None]

    def denormalise(self, z: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return z * self.latents_std[:, None, None] + self.latents_mean[:, None, None]

    @torch.no_grad()
    def measure_statistics(self, batches) -> None:
        """Sets the normalisation from an iterable of pixel batches: a mean for each channel, one deviation for all.

        One deviation keeps the balance between strong and weak channels that the autoencoder has learned.
        """
        mean, variance = channel_moments(self.posterior(pixels.to(self.device))[0] for pixels in batches)
        self.latents_mean.copy_(mean)
        self.latents_std.fill_(variance.mean().sqrt().item())
