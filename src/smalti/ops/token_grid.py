"""Tokens that lie on a grid of rows and columns: changing the grid.

`resize_tokens` lays the tokens out as a map (D, rows, columns) and interpolates it as pictures are resized: a token
stands in the middle of its cell, and a smaller grid averages (antialiasing). Feature maps are resized bilinearly
(REPA, arXiv 2410.06940, where student and teacher differ in their grids), learned positions bicubically
(ViT, arXiv 2010.11929, section 3.2).
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import interpolate

from smalti.core.errors import UserError


def resize_tokens(
    tokens: Tensor,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    mode: Literal["bilinear", "bicubic"] = "bilinear",
) -> Tensor:
    """Moves tokens from one grid to another.

    Args:
        tokens: (B, N, D), rows first.
        grid: rows and columns of the tokens; their product is N.
        new_grid: rows and columns wanted.
        mode: interpolation.

    Returns:
        (B, rows * columns, D) in the dtype of the tokens; the tokens themselves if the grids are equal.

    Raises:
        UserError: the tokens do not fill the grid, or a grid is empty.
    """
    rows, columns = grid
    if tokens.ndim != 3 or rows * columns != tokens.shape[1] or min(*grid, *new_grid) < 1:
        raise UserError(
            f"tokens of shape {tuple(tokens.shape)} on a grid of {rows} x {columns}, wanted on "
            f"{new_grid[0]} x {new_grid[1]}: tokens are (B, rows * columns, D), and each side is at least 1"
        )
    if tuple(grid) == tuple(new_grid):
        return tokens
    field = tokens.transpose(1, 2).unflatten(2, (rows, columns)).float()  # (B, D, rows, columns)
    field = interpolate(field, size=tuple(new_grid), mode=mode, align_corners=False, antialias=True)
    return field.flatten(2).transpose(1, 2).to(tokens.dtype)
