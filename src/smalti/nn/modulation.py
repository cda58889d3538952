"""Adaptive layer norm: shift, scale and gate of a block as linear functions of a conditioning vector.

`x + gate * f(norm(x) * (1 + scale) + shift)`; with the linear layer at zero every block starts as the identity
(adaLN-Zero, DiT, arXiv 2212.09748, section 3.2). Vectors come with their SiLU already applied, once for all blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6


class Triple(NamedTuple):
    """Modulation of one sublayer, each (B, 1, D), or (B, N, D) where times differ by token."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """Activated vectors (B, D) or (B, N, D) -> one `Triple` for each sublayer.

    Args:
        width: D.
        sublayers: number of triples.
    """

    def __init__(self, width: int, sublayers: int):
        super().__init__()
        self.sublayers = sublayers
        self.linear = nn.Linear(width, 3 * sublayers * width)

    def forward(self, activated: Tensor) -> tuple[Triple, ...]:
        parts = per_token(self.linear(activated)).chunk(3 * self.sublayers, dim=-1)
        return tuple(Triple(*parts[3 * i : 3 * i + 3]) for i in range(self.sublayers))


class FinalNorm(nn.Module):
    """The last norm of a transformer, shifted and scaled by the vector: (B, N, D) -> (B, N, D).

    Args:
        width: D.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        shift, scale = per_token(self.linear(activated)).chunk(2, dim=-1)
        return modulated_norm(x, shift, scale)


def per_token(vector: Tensor) -> Tensor:
    """(B, D) -> (B, 1, D); (B, N, D) stays."""
    return vector[:, None] if vector.ndim == 2 else vector


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift` for x (B, N, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`x + gate * update` for x and update (B, N, D)."""
    return torch.addcmul(x, gate, update)
