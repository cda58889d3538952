"""Hidden states of a denoiser against features of an encoder: the projector, the match of grids, the cosine.

    L = - mean over samples and tokens of cos(y, projector(h))

Source: Representation Alignment for Generation (arXiv 2410.06940), section 3 and equation 8; HASTE (arXiv 2505.16792)
has the same term. Dz is the width of the features.
"""

from math import isqrt

from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.ops.token_grid import resize_tokens


def projector(width: int, hidden: int, dim: int) -> nn.Sequential:
    """D -> hidden -> hidden -> Dz with SiLU between."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
    )


def match(features: Tensor, given: tuple[int, int] | None, grid: tuple[int, int, int]) -> Tensor:
    """Teacher features (B, T, Dz) on the model's grid (frames, rows, columns): (B, N, Dz).

    The features of every frame stand one after the other.

    Raises:
        UserError: the features are no whole number of such grids.
    """
    frames, rows, columns = grid
    if given is None:
        side = isqrt(features.shape[1] // frames)
        given = (rows, columns) if features.shape[1] == frames * rows * columns else (side, side)
    if given[0] * given[1] * frames != features.shape[1]:
        raise UserError(
            f"got {features.shape[1]} teacher tokens for {frames} frames; give the grid (rows, columns) of the teacher"
        )
    maps = features.unflatten(1, (frames, -1)).flatten(0, 1)
    return resize_tokens(maps, given, (rows, columns)).unflatten(0, (-1, frames)).flatten(1, 2)


def cosine(projected: Tensor, features: Tensor) -> Tensor:
    """Mean cosine over tokens and samples, in float32, of (B, N, Dz) and (B, N, Dz)."""
    return F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()
