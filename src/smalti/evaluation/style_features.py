"""What a picture looks like, rather than what it shows: numbers from which the hand that drew it can be read.

Mean and deviation of every channel of VGG16's first two stages, in logarithms (the statistics that style transfer
matches), and shares of pixels by how steep they are, how colourful, how light, and how much of the picture is drawn on.

Source: statistics of early features as style, arXiv 1703.06868 (AdaIN), section 3 and equation 13; VGG16,
`evaluation.vgg`.
"""

from itertools import pairwise

import torch
from torch import Tensor

from smalti.evaluation.vgg import VGG16

STAGES, BINS, CHUNK = 2, 8, 32
STEEPNESS = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 3.0)
GROUND, SMALLEST = 0.95, 1e-2
"""Lightness of the darkest channel from which a pixel is ground; what keeps logarithms finite."""


@torch.no_grad()
def style_features(network: VGG16, pixels: Tensor) -> Tensor:
    """Features (B, 412) of pixels (B, 3, H, W) in [-1, 1] on a white ground."""
    parts = [torch.cat([_statistics(network, one), _shares(one)], 1) for one in pixels.split(CHUNK)]
    return torch.cat(parts)


def _statistics(network: VGG16, pixels: Tensor) -> Tensor:
    found, x = [], (pixels.flip(1) + 1) * 127.5 - network.mean
    for block in list(network.blocks)[:STAGES]:
        x = block(x)
        found += [x.mean((2, 3)), x.std((2, 3))]
    return (torch.cat(found, 1).abs() + SMALLEST).log()


def _shares(pixels: Tensor) -> Tensor:
    drawn = (pixels.amin(1) < GROUND).float()
    across = (pixels[..., 1:] - pixels[..., :-1]).abs().amax(1).flatten(1)
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().amax(1).flatten(1)
    steep = torch.cat([across, down], 1)
    steps = [((steep >= low) & (steep < high)).float().mean(1) for low, high in pairwise(STEEPNESS)]
    colourful = _histogram(pixels.amax(1) - pixels.amin(1), drawn, 0.0, 2.0)
    light = _histogram(pixels.mean(1), drawn, -1.0, 1.0)
    sides = [drawn.amax(1).mean(1), drawn.amax(2).mean(1), drawn.mean((1, 2))]
    return torch.cat([(torch.stack(steps, 1) + 1e-3).log(), colourful, light, torch.stack(sides, 1)], 1)


def _histogram(values: Tensor, drawn: Tensor, low: float, high: float) -> Tensor:
    """Shares (B, 8) of what is drawn on by the value there (B, H, W)."""
    edges = torch.linspace(low, high, BINS + 1, device=values.device)
    places = torch.bucketize(values.contiguous(), edges[1:-1])
    shares = torch.stack([((places == one) * drawn).sum((1, 2)) for one in range(BINS)], 1)
    return shares / drawn.sum((1, 2)).clamp_min(1)[:, None]
