"""The Fréchet distance between two sets of features, each seen as a Gaussian.

`FD = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2)` with means m and covariances S. With centred
features scaled so that `A^T A = S`, the eigenvalues of the symmetric product are the squared singular values of
`A1 A2^T`, so the last trace is a sum of singular values: no root of a matrix is formed, and sets smaller than their
width are no special case. A first QR factorisation keeps that matrix at most (D, D).

The distance depends strongly on the number of samples: both sets must have the same count, and a number means
something only beside the floor (real against real) of the same count. It is named after its features and does not
compare with published FID.

Source: Fréchet inception distance (arXiv 1706.08500); Dowson and Landau 1982 for the Gaussian closed form.
"""

import torch
from torch import Tensor

from smalti.core.errors import UserError

METRIC = "FD-EfficientNetLite0"


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets of features (N, D) of equal count N >= 2, in float64.

    Raises:
        UserError: counts or widths differ, there are too few samples, or a value is not finite.
    """
    if features.ndim != 2 or features.shape != reference.shape:
        raise UserError(
            f"got features of shapes {tuple(features.shape)} and {tuple(reference.shape)}; "
            "the distance needs equal counts and widths (N, D): draw as many samples as there are references"
        )
    first, second = _moments(features), _moments(reference)
    mean = (first[0] - second[0]).square().sum()
    traces = first[1].square().sum() + second[1].square().sum()
    cross = torch.linalg.svdvals(first[1] @ second[1].mT).sum()
    return max(0.0, float(mean + traces - 2 * cross))


def frechet_floor(features: Tensor, seed: int = 0, repeats: int = 3) -> float:
    """Mean distance between two random halves of one set (N, D): what a perfect model would reach at N // 2 samples."""
    if len(features) < 4:
        raise UserError(f"got {len(features)} samples for the floor; give at least 4")
    half = len(features) // 2
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(features), generator=generator) for _ in range(repeats)]
    return sum(frechet_distance(features[o[:half]], features[o[half : 2 * half]]) for o in orders) / repeats


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a factor R (min(N, D), D) with `R^T R` = covariance, both in float64."""
    if len(features) < 2:
        raise UserError(f"got {len(features)} samples; a covariance needs at least 2")
    features = features.detach().to("cpu", torch.float64)
    if not torch.isfinite(features).all():
        raise UserError("features hold values that are not finite; look at the pictures they came from")
    mean = features.mean(0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    if centred.shape[0] > centred.shape[1]:
        centred = torch.linalg.qr(centred, mode="r").R
    return mean, centred
