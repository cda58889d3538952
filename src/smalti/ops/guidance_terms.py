"""Guidance as a sum of differences between predictions, eps, velocity or x0 alike.

Away from a damaged prediction: `guided = plain + w (plain - damaged)`, with w the published scale: w = 0 changes
nothing. Where classifier-free guidance of scale s follows, `u + s (c - u)`, a difference added to c counts s times; the
share 1 / s of it makes the sum `u + s (c - u) + w (c - c_damaged)`.

A large w widens the prediction, which saturates colours; rescaling gives it the spread of the plain one back.

Source: PAG (arXiv 2403.17377), equation 13, as eps + w (eps - damaged); rescaling (arXiv 2305.08891), section 3.4.
"""

from torch import Tensor


def guide_away(plain: Tensor, damaged: Tensor, scale: float, rescale: float = 0.0, guidance: float = 1.0) -> Tensor:
    """The conditional prediction, led away from a damaged one.

    Args:
        plain: prediction (B, ...).
        damaged: prediction (B, ...) of the damaged network.
        scale: w.
        rescale: share in [0, 1] of a sample's spread that is set back to that of `plain`.
        guidance: scale of the classifier-free guidance that follows, 1 if none does.
    """
    guided = plain + scale * (plain - damaged)
    if rescale:
        axes = tuple(range(1, plain.ndim))
        spread = plain.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-12)
        guided = guided * (1 + rescale * (spread - 1))
    return guided if guidance == 1 else plain + (guided - plain) / guidance
