"""Fixed sine-cosine positions of a grid, added to tokens.

Half of the channels encode the column, half the row: `[sin(p f_i), cos(p f_i)]` with `f_i = 10000 ** (-i / (D/4))`.
Positions run from 0 to `base` whatever the grid, so a model meets the same range at every size
(DiT, arXiv 2212.09748; the scaling is that of diffusers' `PatchEmbed`).
"""

import torch
from torch import Tensor

from smalti.nn.remember import remember


@remember
def grid_positions(height: int, width: int, channels: int, base: int, device: torch.device) -> Tensor:
    """Positions (H*W, D), rows first, float32.

    Args:
        height: rows of the grid, in tokens.
        width: columns of the grid.
        channels: D, a multiple of 4.
        base: what the last position plus one is scaled to.
        device: where.
    """
    rows = torch.arange(height, dtype=torch.float32, device=device) / (height / base)
    columns = torch.arange(width, dtype=torch.float32, device=device) / (width / base)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([_waves(column, channels // 2), _waves(row, channels // 2)], dim=-1).flatten(0, 1).float()


def _waves(position: Tensor, channels: int) -> Tensor:
    index = torch.arange(channels // 2, dtype=torch.float64, device=position.device)
    angle = position.double()[..., None] * 10000.0 ** (-index / (channels / 2))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
