"""RAE: an autoencoder whose encoder is a frozen vision model, and whose decoder learns to paint from its features.

    z = E(resize(p)),     latent = (z - m) / sqrt(v + 1e-5),     p' = D(z)

m and v are means and variances over the training pictures, for each channel at each place (C, h, w). Only the decoder
learns. It is trained on `z + s n` with s from U(0, tau), drawn for each sample (`training.tokenizer`, setting `tau`),
because a generator's latents are never quite clean; statistics and `encode` know no noise. A latent becomes a patch
of `factor` pixels whatever the encoder's patch, so the same latents may be painted at twice the size.

What comes back shows the same things, not the same pixels: report PSNR beside rFD, and train the decoder on pictures of
the kind that it will meet.

Source: RAE (arXiv 2510.11690), sections 3 and 4.3, and appendix on normalisation.
"""

from collections.abc import Iterable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Generators, Latents
from smalti.nn.vit_decoder import ViTDecoder
from smalti.tokenizers.conv_autoencoder import Reconstruction
from smalti.tokenizers.latent_statistics import element_moments
from smalti.tokenizers.representation_encoder import RepresentationEncoder
from smalti.tokenizers.vision_backends import load_teacher

FLOOR = 1e-5
"""Added to the variances."""


class RAE(ModelMixin, ConfigMixin):
    """A representation autoencoder.

    Args:
        encoder: a name or folder that `load_teacher` knows; its weights are neither trained nor saved.
        factor: pixels a latent along each side of what is decoded.
        latent_channels: the width of the encoder's features.
        tokens: rows and columns of the latents, which is what pictures are resized to.
        depth, width, heads, ffn_ratio: of the decoder, see `ViTDecoder`.

    Raises:
        UserError: the encoder has another width.

    Example:
        >>> rae = RAE("random", depth=1, width=8, heads=2)
        >>> latents = rae.encode(torch.zeros(1, 3, 64, 64))
        >>> latents.tensor.shape, rae.decode(latents).shape
        (torch.Size([1, 192, 8, 8]), torch.Size([1, 3, 64, 64]))
    """

    _no_split_modules = ["EncoderBlock"]
    latents_mean: Tensor
    latents_variance: Tensor

    @register_to_config
    def __init__(
        self,
        encoder: str = "vit-self",
        factor: int = 8,
        latent_channels: int = 192,
        tokens: tuple[int, int] = (8, 8),
        depth: int = 6,
        width: int = 192,
        heads: int = 6,
        ffn_ratio: float = 4.0,
    ):
        super().__init__()
        rows, columns = tokens
        teacher = load_teacher(encoder, (rows, columns))
        if teacher.dim != latent_channels:
            raise UserError(
                f"encoder {encoder} gives {teacher.dim} channels, not {latent_channels}; set latent_channels"
            )
        self.factor, self.latent_channels = factor, latent_channels
        self._encoder = [RepresentationEncoder(teacher)]  # unregistered: it is loaded by name, and never saved
        colours = (teacher.mean.flatten().tolist(), teacher.std.flatten().tolist())
        self.decoder = ViTDecoder(latent_channels, factor, depth, width, heads, ffn_ratio, max(tokens), *colours)
        self.register_buffer("latents_mean", torch.zeros(latent_channels, rows, columns))
        self.register_buffer("latents_variance", torch.ones(latent_channels, rows, columns))

    @property
    def encoder(self) -> RepresentationEncoder:
        """The frozen encoder, on the device of the decoder."""
        self._encoder[0] = self._encoder[0].to(self.device)
        return self._encoder[0]

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Encodes, adds noise (B, C, h, w) to the features if given, and decodes; there is no posterior to speak of."""
        z = self.encoder(pixels)
        return Reconstruction(self.decoder(z if noise is None else z + noise), z, torch.zeros_like(z))

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, generator: Generators | None = None) -> Latents:
        """Normalised latents of pixels (B, 3, H, W) in [-1, 1] of any size; nothing is random."""
        z = self.encoder(pixels)
        return Latents(self.normalise(z), statistics={"mean": z})

    @torch.no_grad()
    def decode(self, latents: Latents, *, generator: Generators | None = None, **context) -> Tensor:
        """Pixels (B, 3, h * factor, w * factor) in [-1, 1] of normalised latents; nothing else is used."""
        return self.decoder(self.denormalise(latents.tensor)).clamp(-1, 1)

    def start_linear(self, pixels: Tensor) -> None:
        """Lets the decoder begin as the best linear one for these pictures (B, 3, H, W), at the size that it paints."""
        self.decoder.start_linear(self.encoder(pixels), pixels)

    def normalise(self, z: Tensor) -> Tensor:
        """Features (B, C, h, w) to zero mean and unit variance, each channel at each place."""
        return (z - self.latents_mean) * torch.rsqrt(self.latents_variance + FLOOR)

    def denormalise(self, z: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return z * torch.sqrt(self.latents_variance + FLOOR) + self.latents_mean

    @torch.no_grad()
    def measure_statistics(self, batches: Iterable[Tensor]) -> None:
        """Sets the normalisation from an iterable of pixel batches, in one pass."""
        mean, variance = element_moments(self.encoder(pixels.to(self.device)) for pixels in batches)
        self.latents_mean.copy_(mean)
        self.latents_variance.copy_(variance)
