"""A tiny denoiser and a tiny source of samples, real enough to learn."""

import time
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalti.core.protocols import Batch, Cond
from smalti.core.seeds import rand


class ToyDenoiser(ModelMixin, ConfigMixin):
    """Residual blocks on flat samples (B, 1, 2, 2), conditioned on time and label."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, width: int = 32, depth: int = 2, dropout: float = 0.0, unused: bool = False):
        super().__init__()
        self.enter = nn.Linear(5, width)
        self.label = nn.Embedding(3, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width)
            )
            for _ in range(depth)
        )
        self.leave = nn.Linear(width, 4)
        self.unused = nn.Linear(width, width) if unused else None
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        hidden = self.enter(torch.cat([x.flatten(1), t[:, None]], 1)) + self.label(cond.label)
        for block in self.blocks:
            change = checkpoint(block, hidden, use_reentrant=False) if self.gradient_checkpointing else block(hidden)
            hidden = hidden + change
        return self.leave(hidden).reshape(x.shape)


@dataclass
class ToySource:
    """Two clusters, one a label; the third label is a dropped condition. Samples in `broken` are NaN; delay in s."""

    count: int = 64
    broken: tuple[int, ...] = ()
    groups: list[Tensor] | None = None
    delay: float = 0.0

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, generators: list[torch.Generator]) -> Batch:
        time.sleep(self.delay)
        samples, labels = [], []
        for index, generator in zip(indices.tolist(), generators):
            fixed = torch.Generator().manual_seed(index)
            sign = 1.0 if index % 2 else -1.0
            sample = sign * torch.tensor([1.0, 0.5, -0.5, 1.0]) + 0.1 * torch.randn(4, generator=fixed)
            samples.append(sample * float("nan") if index in self.broken else sample)
            labels.append(2 if torch.rand((), generator=generator) < 0.1 else index % 2)
        return Batch(torch.stack(samples).reshape(-1, 1, 2, 2), Cond(label=torch.tensor(labels)), indices)


DIM = 6
"""Width of the features of the toy teacher."""


class PlanesSource:
    """Latents (4, 8, 8) of a few waves; the teacher's features are a linear map of each token's clean patch."""

    def __init__(self, is_cached=True, shuffled=False):
        self.is_cached, self.shuffled = is_cached, shuffled
        generator = torch.Generator().manual_seed(0)
        self.x0 = torch.randn(32, 4, 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
        self.features = DotTeacher()(self.x0)

    def __len__(self):
        return len(self.x0)

    def batch(self, indices, generators):
        rand((len(indices), 1), generators)
        x0 = self.x0[indices]
        rows = (indices + 7) % len(self) if self.shuffled else indices
        extra = {"teacher": self.features[rows]} if self.is_cached else {"pixels": x0}
        cond = Cond(
            pooled=torch.zeros(len(indices), 10), label=torch.zeros(len(indices), dtype=torch.long), extra=extra
        )
        return Batch(x0, cond, indices)


class DotTeacher(nn.Module):
    """A fixed map of 2 x 2 patches (B, 16, 6)."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(DIM, 4, 2, 2, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, pixels):
        return nn.functional.conv2d(pixels, self.weight, stride=2).flatten(2).transpose(1, 2)
