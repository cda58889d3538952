"""Adaptive layer norm: shift, scale and gate of a block as linear functions of a conditioning vector.

`x + gate * f(norm(x) * (1 + scale) + shift)`; with the linear layer at zero every block starts as the identity
(adaLN-Zero, DiT, arXiv 2212.09748, section 3.2). Vectors come with their SiLU already applied, once for all blocks.
One linear layer may serve all blocks, which then only add a table of their own to what it gives (adaLN-single,
PixArt-alpha, arXiv 2310.00426, section 2.3; our tables start at zero, so that the gates do).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.nn.norm import RMSNorm

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
        has_shift: False leaves out the shifts, which are zero then, and their third of the weights.
    """

    def __init__(self, width: int, sublayers: int, has_shift: bool = True):
        super().__init__()
        self.sublayers, self.has_shift = sublayers, has_shift
        self.linear = nn.Linear(width, (2 + has_shift) * sublayers * width)

    def forward(self, activated: Tensor) -> tuple[Triple, ...]:
        vectors = self.linear(activated)
        if self.has_shift:
            return triples(vectors, self.sublayers)
        parts, none = per_token(vectors).chunk(2 * self.sublayers, dim=-1), vectors.new_zeros(())
        return tuple(Triple(none, *parts[2 * i : 2 * i + 2]) for i in range(self.sublayers))


class ModulationTable(nn.Module):
    """A block's share of a modulation that all blocks have in common: that one's output + a table -> `Triple`s.

    Args:
        width: D.
        sublayers: number of triples.
    """

    def __init__(self, width: int, sublayers: int):
        super().__init__()
        self.sublayers = sublayers
        self.table = nn.Parameter(torch.zeros(3 * sublayers * width))

    def forward(self, shared: Tensor) -> tuple[Triple, ...]:
        """Takes (B, 3 * sublayers * D) or (B, N, 3 * sublayers * D), the output of one `Modulation.linear`."""
        return triples(shared + self.table, self.sublayers)


class ModulatedNorm(nn.Module):
    """`modulated_norm` as a child of a block, so that it need not run where nothing needs its output."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulated_norm(x, shift, scale)


class FinalNorm(nn.Module):
    """The last norm of a transformer, shifted and scaled by the vector: (B, N, D) -> (B, N, D).

    Args:
        width: D.
        is_rms: a learned RMS norm in place of a layer norm without weights.
    """

    def __init__(self, width: int, is_rms: bool = False):
        super().__init__()
        self.norm = RMSNorm(width, EPS) if is_rms else None
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        shift, scale = per_token(self.linear(activated)).chunk(2, dim=-1)
        return modulated_norm(x, shift, scale) if self.norm is None else modulate(self.norm(x), shift, scale)


def triples(vectors: Tensor, sublayers: int) -> tuple[Triple, ...]:
    """(B, 3 * sublayers * D) or (B, N, 3 * sublayers * D) -> shift, scale and gate of each sublayer."""
    parts = per_token(vectors).chunk(3 * sublayers, dim=-1)
    return tuple(Triple(*parts[3 * i : 3 * i + 3]) for i in range(sublayers))


def per_token(vector: Tensor) -> Tensor:
    """(B, D) -> (B, 1, D); (B, N, D) stays."""
    return vector[:, None] if vector.ndim == 2 else vector


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift` for x (B, N, D)."""
    return modulate(F.layer_norm(x, x.shape[-1:], eps=eps), shift, scale)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`normed * (1 + scale) + shift` for normed tokens (B, N, D)."""
    return torch.addcmul(shift, normed, 1 + scale)


def gated_add(x: Tensor, gate: Tensor, update: Tensor, factor: float = 1.0) -> Tensor:
    """`x + factor * gate * update` for x and update (B, N, D)."""
    return torch.addcmul(x, gate, update, value=factor)
