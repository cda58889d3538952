"""How well a tokenizer keeps pictures, and what its latents look like.

PSNR and SSIM (Wang et al. 2004, section III: a Gaussian window of 11 pixels, deviation 1.5, on pixels in [0, 1], mean
over channels), the distance of VGG16's stages, and rFD, the Fréchet distance between features of reconstructed and of
real pictures. Of normalised latents: mean and deviation over all, and how unequal the channels' deviations are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from smalti.core.errors import UserError
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.vgg import VGG16, vgg_distance
from smalti.objectives.reconstruction import psnr

WINDOW, DEVIATION = 11, 1.5
STABLE = (0.01**2, 0.03**2)
CHUNK = 16


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (B,), at most 1, of pixels (B, C, H, W) in [-1, 1] with sides from 11.

    Raises:
        UserError: a side is shorter than the window.
    """
    if min(a.shape[-2:]) < WINDOW:
        raise UserError(f"got pictures of {tuple(a.shape[-2:])} pixels; SSIM needs sides of at least {WINDOW}")
    places = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-places.square() / (2 * DEVIATION**2))
    line = line / line.sum()
    channels = a.shape[1]
    window = torch.outer(line, line).to(a.device).expand(channels, 1, WINDOW, WINDOW)
    a, b = ((one.double() + 1) / 2 for one in (a, b))

    def blurred(x: Tensor) -> Tensor:
        return functional.conv2d(x, window, groups=channels)

    mean_a, mean_b = blurred(a), blurred(b)
    spread_a, spread_b = blurred(a * a) - mean_a.square(), blurred(b * b) - mean_b.square()
    shared = blurred(a * b) - mean_a * mean_b
    one, two = STABLE
    map_ = (2 * mean_a * mean_b + one) * (2 * shared + two)
    return (map_ / ((mean_a.square() + mean_b.square() + one) * (spread_a + spread_b + two))).mean((1, 2, 3))


@torch.no_grad()
def reconstruction_report(
    tokenizer: Any, pictures: Any, indices: Sequence[int] | None = None, network: VGG16 | None = None
) -> dict[str, float]:
    """Figures of a tokenizer on pictures of one size.

    Args:
        tokenizer: with `encode(pixels) -> Latents` and `decode(latents) -> pixels`.
        pictures: `pixels(indices)` gives (B, 3, H, W) in [-1, 1].
        indices: which; all if None. rFD needs hundreds to mean something.
        network: VGG16; the distance is left out if None.
    """
    found: dict[str, list[Tensor]] = {"PSNR": [], "SSIM": [], "VGG distance": []}
    extract = EfficientNetLite0()
    features: tuple[list[Tensor], list[Tensor]] = ([], [])
    latents = []
    for chunk in _chunks(range(len(pictures)) if indices is None else indices):
        real = pictures.pixels(chunk)
        encoded = tokenizer.encode(real)
        made = tokenizer.decode(encoded)
        latents.append(encoded.tensor.float())
        found["PSNR"].append(psnr(made, real))
        found["SSIM"].append(ssim(made, real))
        if network is not None:
            found["VGG distance"].append(vgg_distance(network, made, real))
        for kept, pixels in zip(features, (made, real), strict=True):
            kept.append(extract(pixels))
    figures = {name: torch.cat(values).double().mean().item() for name, values in found.items() if values}
    figures["rFD-EfficientNetLite0"] = frechet_distance(*(torch.cat(some) for some in features))
    return figures | latent_statistics(torch.cat(latents))


def latent_statistics(latents: Tensor) -> dict[str, float]:
    """Mean and deviation of normalised latents (N, C, ...), and the loudest channel's deviation over the quietest's."""
    channels = latents.transpose(0, 1).flatten(1).double()
    deviations = channels.std(1)
    return {
        "latent mean": channels.mean().item(),
        "latent deviation": channels.std().item(),
        "loudest over quietest channel": (deviations.max() / deviations.min().clamp_min(1e-12)).item(),
    }


def _chunks(indices: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(indices), CHUNK):
        yield list(indices[start : start + CHUNK])
