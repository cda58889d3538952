"""The discrete diffusion process of DDPM: how much noise each of its T timesteps has.

    z_i = alpha_i * x0 + sigma_i * noise,   alpha_i^2 = prod_{j <= i} (1 - beta_j),   alpha^2 + sigma^2 = 1

for i = 0 (almost data) to T - 1 (almost noise). In our time `t = sigma / (alpha + sigma)`, and back
`alpha = (1 - t) / n, sigma = t / n` with `n = sqrt((1 - t)^2 + t^2)`; `x = n z` lies on our straight path.

Source: DDPM (arXiv 2006.11239), equations 4 to 7, linear betas of section 4; cosine, arXiv 2102.09672, equation 17.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.time import time_from_alpha_sigma

KINDS = ("linear", "cosine")
LARGEST_BETA = 0.999


@dataclass(frozen=True)
class BetaProcess:
    """Tables (T,) of a process, float64 on the CPU.

    Args:
        kind: linear betas (1e-4 to 0.02 for T = 1000, in proportion for others), or cosine alphas.
        count: T, at least 2.

    Raises:
        UserError: the kind is unknown, or there are too few timesteps for linear betas below 1.
    """

    kind: Literal["linear", "cosine"] = "linear"
    count: int = 1000

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown_name("kind of betas", self.kind, KINDS)
        least = 21 if self.kind == "linear" else 2
        if self.count < least:
            raise UserError(f"got {self.count} timesteps; {self.kind} betas need at least {least}")

    @cached_property
    def betas(self) -> Tensor:
        """Noise that each timestep adds, in (0, 1)."""
        if self.kind == "linear":
            scale = 1000 / self.count
            return torch.linspace(1e-4 * scale, 0.02 * scale, self.count, dtype=torch.float64)
        steps = torch.arange(self.count + 1, dtype=torch.float64) / self.count
        kept = torch.cos((steps + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - kept[1:] / kept[:-1]).clamp(max=LARGEST_BETA)

    @cached_property
    def alphas(self) -> Tensor:
        """Factor on the data."""
        return (1 - self.betas).cumprod(0).sqrt()

    @cached_property
    def sigmas(self) -> Tensor:
        """Factor on the noise."""
        return (1 - (1 - self.betas).cumprod(0)).sqrt()

    @cached_property
    def times(self) -> Tensor:
        """Our times, rising."""
        return time_from_alpha_sigma(self.alphas, self.sigmas)

    @cached_property
    def posterior_variances(self) -> Tensor:
        """Of z_(i-1) given z_i and x0; at i = 0, where it is 0, that of i = 1."""
        before = torch.cat([torch.zeros(1, dtype=torch.float64), self.sigmas[:-1]]).square()
        variances = self.betas * before / self.sigmas.square()
        return torch.cat([variances[1:2], variances[1:]])

    def posterior_mean(self, x0: Tensor, z: Tensor, index: Tensor) -> Tensor:
        """Mean (B, ...) of z_(i-1) given z_i and x0 (B, ...) at timesteps i (B,)."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas[:-1]])
        of_x0 = before * self.betas / self.sigmas.square()
        of_z = (1 - self.betas).sqrt() * (1 - before.square()) / self.sigmas.square()
        return take(of_x0, index, x0) * x0 + take(of_z, index, z) * z

    def timestep(self, t: Tensor) -> Tensor:
        """Timesteps in [0, T - 1] of our times (B,), float32, with fractions between the entries of the table."""
        times = self.times.to(t.device)
        t = t.double().clamp(times[0], times[-1])
        above = torch.searchsorted(times, t).clamp(1, self.count - 1)
        low, high = times[above - 1], times[above]
        return (above - 1 + (t - low) / (high - low)).float()


def take(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Entries (B,) of a table, made broadcastable with `like` (B, ...)."""
    found = table.to(like.device)[index.to(like.device)].to(like.dtype)
    return found.reshape(-1, *[1] * (like.ndim - 1))
