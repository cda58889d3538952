"""A small network that finds digits in a picture: for every pixel the ground, or a stroke of which digit.

It learns the maps of the training digits once, in about a minute, and is kept in the cache.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.data.digit_maps import MAP_CLASSES, digit_maps
from smalti.data.digits import load_digits
from smalti.data.packages import cache_folder
from smalti.evaluation.fit_once import SEED, fit_once

EPOCHS, WIDTHS = 6, (16, 32, 64)


class DigitSegmenter(nn.Module):
    """Pixels (B, 1, 32, 32) in [-1, 1] -> logits (B, 11, 32, 32): halved three times, and back with what was seen."""

    def __init__(self):
        super().__init__()
        sides = list(zip((1, *WIDTHS), WIDTHS))
        self.down = nn.ModuleList(nn.Conv2d(one, two, 3, stride=2, padding=1) for one, two in sides)
        self.whole = nn.Linear(WIDTHS[-1] * 16, WIDTHS[-1])
        self.up = nn.ModuleList(nn.Conv2d(two + one, one, 3, padding=1) for one, two in reversed(sides[1:]))
        self.head = nn.Conv2d(WIDTHS[0] + 1, MAP_CLASSES, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = [pixels]
        for layer in self.down:
            seen.append(F.relu(layer(seen[-1])))
        x = seen[-1] + self.whole(seen[-1].flatten(1))[..., None, None]
        for layer, skipped in zip(self.up, reversed(seen[1:-1]), strict=True):
            x = F.relu(layer(torch.cat([F.interpolate(x, scale_factor=2.0), skipped], 1)))
        return self.head(torch.cat([F.interpolate(x, scale_factor=2.0), pixels], 1))


@torch.no_grad()
def segment_digits(pixels: Tensor) -> Tensor:
    """Maps (N, 32, 32) long that are found in pixels (N, 1, 32, 32) in [-1, 1]."""
    segmenter = load_segmenter()
    return torch.cat([segmenter(part.clamp(-1, 1)).argmax(1) for part in pixels.split(250)])


@cache
def load_segmenter() -> DigitSegmenter:
    """The segmenter, trained at the first call."""
    digits, model = load_digits("train"), DigitSegmenter()
    path = cache_folder() / "prepared" / f"digit-segmenter-{digits.hash[:12]}-{SEED}.safetensors"
    fit_once(model, path, digits.pixels(), digit_maps(digits), EPOCHS)
    return model
