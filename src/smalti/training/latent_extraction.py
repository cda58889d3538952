"""Latents of a data set for a denoiser: normalised by channel, kept in shards, mirrored pictures as a second view.

The statistics of every channel are written into the autoencoder itself, so that `encode` normalises and `decode` undoes
it wherever its weights go: forgetting one half of that is the most common reason for broken pictures.

Source: LightningDiT (Reconstruction vs. Generation, arXiv 2501.01423), section 4.1 and its code (latents of pictures
and of their mirror images, mean and deviation of each channel, multiplier 1).
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from smalti.data.latent_cache import LatentCache, build_cache, cache_key
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.latent_statistics import channel_moments
from smalti.training.autoencoder import Pictures
from smalti.zoo.loader import weights_hash

SMALLEST = 1e-6


@torch.no_grad()
def measure_channels(model: ConvAutoencoder, batches: Iterable[Tensor]) -> None:
    """Sets the normalisation from pixel batches (B, 3, H, W): mean and deviation of each channel."""
    mean, variance = channel_moments(model.posterior(pixels.to(model.device))[0] for pixels in batches)
    model.latents_mean.copy_(mean)
    model.latents_std.copy_(variance.sqrt().clamp_min(SMALLEST))


def extract_latents(
    model: ConvAutoencoder, pictures: Pictures, name: str, cache: Path | str, flips: bool = True
) -> list[LatentCache]:
    """One table of normalised latents (N, C, h, w) a view: the pictures, and their mirror images.

    Args:
        model: with its statistics set.
        pictures: what is encoded.
        name: of the pictures, such as their hash: with the weights it names the tables on disk.
        cache: folder of all tables.
        flips: whether there is a second view.
    """

    def encode(rows: Tensor, is_flipped: bool) -> Tensor:
        pixels = pictures.pixels(rows.tolist())
        return model.encode(pixels.flip(-1) if is_flipped else pixels).tensor

    return [
        build_cache(
            cache, cache_key("extracted", name, weights_hash(model), len(pictures), is_flipped), len(pictures),
            lambda rows, is_flipped=is_flipped: encode(rows, is_flipped),
        )
        for is_flipped in ([False, True] if flips else [False])
    ]  # fmt: skip
