"""Rotary positions for any number of axes and arbitrary real labels.

Channel pairs (2i, 2i+1) of an axis with `dim` channels are turned by the angle `label * theta ** (-2i / dim)`:
`(a, b) -> (a cos - b sin, b cos + a sin)`; the axes share the head's channels one after the other. The factors of a
token are one float32 tensor (d/2, 2) of (cosine, sine), computed from angles in float64.

Source: RoFormer (arXiv 2104.09864, eq. 15); several axes and interleaved pairs as in FLUX.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.nn.remember import remember


def rope_factors(labels: Tensor, axes_dims: Sequence[int], theta: float = 10000.0) -> Tensor:
    """Rotary factors of real position labels.

    Args:
        labels: positions (..., axes), any real numbers.
        axes_dims: even number of channels of each axis; their sum is d.
        theta: base of the wavelengths.

    Returns:
        (..., d/2, 2) float32: cosine and sine of every channel pair.

    Raises:
        ValueError: labels and axes do not fit, or a dim is odd.
    """
    if labels.shape[-1] != len(axes_dims) or any(dim % 2 for dim in axes_dims):
        raise ValueError(f"got labels of {labels.shape[-1]} axes for even channel counts {tuple(axes_dims)}")
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=labels.device) / dim
        angles.append(labels[..., axis, None].to(torch.float64) * theta**-exponent)
    angle = torch.cat(angles, dim=-1)  # (..., d/2)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def grid_labels(
    text_length: int, height: int, width: int, device: torch.device | None = None, frames: int = 1
) -> Tensor:
    """Labels (M + F*H*W, 3) of a text-first joint sequence: zeros for text, (frame, row, column) for the image."""
    axes = (torch.arange(side, dtype=torch.float32, device=device) for side in (frames, height, width))
    image = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    return torch.cat([image.new_zeros(text_length, 3), image])


@remember
def grid_rope(
    text_length: int,
    height: int,
    width: int,
    axes_dims: tuple[int, ...],
    device: torch.device,
    frames: int = 1,
    theta: float = 10000.0,
) -> Tensor:
    """`rope_factors` of `grid_labels`: (M + F*H*W, d/2, 2)."""
    return rope_factors(grid_labels(text_length, height, width, device, frames), axes_dims, theta)


def plane_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of (frame, row, column) for pictures: none for the frame, half of the head for each of the others.

    Raises:
        UserError: the head's channels are no multiple of 4.
    """
    if head_dim % 4:
        raise UserError(f"heads of {head_dim} channels have no two halves of pairs; give head_dim a multiple of 4")
    return (0, head_dim // 2, head_dim // 2)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Turns the channel pairs of x, in float32.

    Args:
        x: (..., d), its last dim contiguous.
        rope: factors (..., d/2, 2) that broadcast with the pairs of x.

    Returns:
        (..., d) in the dtype of x.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = _turn_plainly(pairs, rope) if torch.compiler.is_compiling() else _turn_as_complex(pairs, rope)
    return turned.flatten(-2).to(x.dtype)


def _turn_plainly(pairs: Tensor, rope: Tensor) -> Tensor:
    """The formula; compilers fuse it, while they cannot fuse complex numbers."""
    (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _turn_as_complex(pairs: Tensor, rope: Tensor) -> Tensor:
    """The same in one pass: a product of complex numbers."""
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))


def norm_rope(x: Tensor, weight: Tensor, rope: Tensor, eps: float) -> Tensor:
    """RMS norm over the channels, then rotation: `apply_rope(x / sqrt(mean(x^2) + eps) * weight, rope)`.

    Args:
        x: queries or keys (..., d).
        weight: channel weights that broadcast with x.
        rope: factors (..., d/2, 2) that broadcast with the pairs of x.
        eps: added to the mean square.

    Returns:
        (..., d) in the dtype of x, computed in float32.
    """
    wide = x.float()
    mean_square = (wide * wide).mean(-1, keepdim=True)  # the derivative of square() would copy x once more
    return apply_rope(wide * (weight.float() * torch.rsqrt(mean_square + eps)), rope).to(x.dtype)
