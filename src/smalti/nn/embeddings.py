"""Embeddings of time, vectors and labels into the width of a transformer.

Time: `[cos(1000 t f_i), sin(1000 t f_i)]` with `f_i = 10000 ** (-i / (half - shift))`, then a two-layer SiLU MLP
(arXiv 1706.03762, section 3.5; DiT, arXiv 2212.09748). FLUX.1 has shift 0, DiT in diffusers shift 1. Or with random
frequencies `[cos(2 pi t f_i), sin(2 pi t f_i)]`, f_i from a normal distribution once and for all (arXiv 2006.10739,
section 6.1; of time, arXiv 2011.13456, appendix C).
"""

import math

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError

TIMESTEP_SCALE = 1000.0


def sinusoidal(t: Tensor, dim: int = 256, shift: int = 0, scale: float = TIMESTEP_SCALE) -> Tensor:
    """Sinusoidal features of times.

    Args:
        t: times (...), in [0, 1] with the default scale.
        dim: even number of features.
        shift: taken off the number of frequencies, see the module.
        scale: what t is multiplied by.

    Returns:
        (..., dim) float32, cosines first.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10000.0) * index / (half - shift))
    angle = (t.float() * scale)[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class VectorEmbedder(nn.Module):
    """Two-layer SiLU MLP: vectors (..., K) -> (..., D).

    Args:
        in_features: K.
        width: D.
    """

    def __init__(self, in_features: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(x)))


class TimeEmbedder(nn.Module):
    """Times (...) in [0, 1], or guidance scales (...), -> (..., D).

    Args:
        width: D.
        frequencies: number of sinusoidal features.
        shift: see `sinusoidal`.
    """

    def __init__(self, width: int, frequencies: int = 256, shift: int = 0):
        super().__init__()
        self.frequencies = frequencies
        self.shift = shift
        self.mlp = VectorEmbedder(frequencies, width)

    def forward(self, t: Tensor) -> Tensor:
        features = sinusoidal(t, self.frequencies, self.shift)
        return self.mlp(features.to(self.mlp.linear_1.bias.dtype))


class FourierTimeEmbedder(nn.Module):
    """Times (...) in [0, 1] -> (..., D), by random frequencies that are drawn once and never learn.

    Args:
        width: D.
        frequencies: their number, half of that of the features.
        scale: their standard deviation, in turns over the whole of time.
    """

    def __init__(self, width: int, frequencies: int = 256, scale: float = 1.0):
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(frequencies))
        self.mlp = VectorEmbedder(2 * frequencies, width)

    def forward(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * t.float()[..., None] * self.frequencies.float()  # type: ignore[operator]
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp.linear_1.bias.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, D); index `num_labels` stands for "none", used to drop labels in training.

    Args:
        num_labels: number of labels; the table has one row more.
        width: D.
    """

    def __init__(self, num_labels: int, width: int):
        super().__init__()
        self.num_labels = num_labels
        self.table = nn.Embedding(num_labels + 1, width)

    def forward(self, label: Tensor | None, batch: int) -> Tensor:
        if label is None:
            return self.table.weight[self.num_labels].expand(batch, -1)
        if label.dtype != torch.long:
            raise UserError(f"labels have dtype {label.dtype}; give torch.long indices from 0 to {self.num_labels}")
        return self.table(label)
