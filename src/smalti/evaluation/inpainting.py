"""How well hidden parts of pictures were filled in, measured where they were hidden.

Errors inside the mask alone: mean square, and PSNR in dB; outside, the largest error, which is 0 after a paste. The
perceptual distance compares whole pictures, outside of whose masks nothing differs after a paste.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.evaluation.vgg import VGG16, vgg_distance


class InpaintReport(NamedTuple):
    """Figures of filled pictures.

    Args:
        inside: mean squared error of the hidden pixels, for pixels in [-1, 1].
        psnr: of the hidden pixels in dB, mean over pictures.
        outside: largest error of a given pixel.
        perceptual: mean VGG distance; NaN without a network.
    """

    inside: float
    psnr: float
    outside: float
    perceptual: float


@torch.no_grad()
def inpaint_report(drawn: Tensor, real: Tensor, mask: Tensor, network: VGG16 | None = None) -> InpaintReport:
    """Figures of pictures.

    Args:
        drawn: filled pictures (N, C, H, W) in [-1, 1].
        real: whole ones.
        mask: (N, 1, H, W), 1 = was hidden; every picture has some of both.
        network: VGG16; grey pictures are given to it in three equal channels.

    Raises:
        UserError: shapes do not fit, or a mask hides nothing.
    """
    if drawn.shape != real.shape or mask.shape != (len(real), 1, *real.shape[-2:]):
        raise UserError(f"got pictures {tuple(drawn.shape)} and {tuple(real.shape)}, masks {tuple(mask.shape)}")
    hidden = mask.flatten(1).sum(1) * real.shape[1]
    if not hidden.all():
        raise UserError("a mask hides nothing, so there is nothing to measure; leave that picture out")
    difference = (drawn - real).double()
    errors = (difference.square() * mask).flatten(1).sum(1) / hidden
    perceptual = float("nan")
    if network is not None:
        pairs = [one.expand(-1, 3, -1, -1) for one in (drawn, real)]
        parts = zip(*(one.split(64) for one in pairs), strict=True)
        perceptual = float(torch.cat([vgg_distance(network, one, other) for one, other in parts]).mean())
    return InpaintReport(
        inside=float(errors.mean()),
        psnr=float((-10 * (errors / 4).clamp_min(1e-10).log10()).mean()),
        outside=float((difference.abs() * (1 - mask)).max()),
        perceptual=perceptual,
    )
