"""Semantic maps of handwritten digits: for every pixel whether a stroke is there, and of which digit.

A stroke is wider in the map than in the picture, so that the map says where to write what, and not how.
"""

import torch
from torch import Tensor

from smalti.data.digits import CLASSES, DigitSet

MAP_CLASSES = CLASSES + 1
"""Class 0 is the ground, class d + 1 a stroke of the digit d."""
LEVEL = -0.2


def digit_maps(digits: DigitSet) -> Tensor:
    """Maps (N, 32, 32) long."""
    return maps_of(digits.pixels(), digits.labels)


def maps_of(pixels: Tensor, labels: Tensor) -> Tensor:
    """Maps (N, H, W) long of pixels (N, 1, H, W) in [-1, 1], white on black, with classes (N,)."""
    strokes = torch.nn.functional.max_pool2d((pixels > LEVEL).float(), 3, stride=1, padding=1)[:, 0]
    return strokes.long() * (labels + 1)[:, None, None]
