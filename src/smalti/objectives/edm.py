"""EDM: denoising at any noise level by one well-scaled network, with loss and preconditioning in our time.

With `z = x0 + sigma * noise` the estimate of x0 is

    D = c_skip z + c_out F(c_in z, ln(sigma) / 4)
    c_skip = s^2 / (sigma^2 + s^2),  c_out = sigma s / sqrt(sigma^2 + s^2),  c_in = 1 / sqrt(sigma^2 + s^2)
    loss = (sigma^2 + s^2) / (sigma s)^2 * |D - x0|^2

for data of standard deviation s, and `ln(sigma) = mean + std * n` in training, n normal. With `t = sigma / (1 + sigma)`
and `xt = (1 - t) z` a preconditioned network is a denoiser like all others (see `velocity`), and the loss takes any.

Source: EDM (arXiv 2206.00364), table 1 and equation 8; masked as in MicroDiT (arXiv 2407.15811), section 3.1.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Denoiser, Generators, LossResult, TrainState
from smalti.core.seeds import randn
from smalti.core.time import denoised_from_velocity, expand_time, interpolate
from smalti.objectives.masked_loss import draw_mask, sample_errors, with_mask
from smalti.objectives.time_sampling import LogitNormal, sample_times
from smalti.ops.token_masks import RandomMask, TokenMask

SIGMA_MAX = 80.0


class Scaled(NamedTuple):
    """What a preconditioned network is given.

    Args:
        x: c_in z (B, ...).
        time: ln(sigma) / 4 (B,).
    """

    x: Tensor
    time: Tensor


@dataclass(frozen=True)
class Preconditioning:
    """Scales of input, output and time for data of a standard deviation.

    Args:
        sigma_data: s.
        sigma_max: no noise level is above it; t = 1, where sigma has no end, counts as this one.
    """

    sigma_data: float = 0.5
    sigma_max: float = SIGMA_MAX

    def __post_init__(self):
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise UserError(f"the data's standard deviation is {self.sigma_data}; give a finite one above 0")

    def sigma(self, t: Tensor) -> Tensor:
        """Noise levels (B,) of times (B,)."""
        t = t.float().clamp(1e-6, self.sigma_max / (1 + self.sigma_max))
        return t / (1 - t)

    def scale(self, xt: Tensor, t: Tensor) -> Scaled:
        """The network's inputs from xt (B, ...) at times t (B,)."""
        sigma = self.sigma(t)
        factor = (1 + sigma) / (sigma**2 + self.sigma_data**2).sqrt()  # z = (1 + sigma) xt
        return Scaled(xt * expand_time(factor, xt), sigma.log() / 4)

    def velocity(self, xt: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The velocity `(z - D) / sigma - D` of our path from the network's output (B, ...)."""
        sigma, s = self.sigma(t), self.sigma_data
        spread = sigma**2 + s**2
        z = xt * expand_time(1 + sigma, xt)
        # (1 - c_skip) / sigma = sigma / spread: written so that nothing is divided by a small sigma
        of_z = sigma / spread - s**2 / spread
        of_output = -(1 + sigma) * s / spread.sqrt()  # - c_out / sigma - c_out
        return expand_time(of_z, xt) * z + expand_time(of_output, xt) * output


@dataclass(frozen=True)
class EDM:
    """The loss of EDM, masked if wanted.

    Args:
        mean, std: of ln(sigma), P_mean and P_std in the paper.
        sigma_data: standard deviation of the data.
        mask: which patches stay; a ratio of 0 keeps all.
        patch_size: P of the denoiser.
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5
    mask: TokenMask = field(default_factory=lambda: RandomMask(0.0))
    patch_size: int = 1

    def __post_init__(self):
        Preconditioning(self.sigma_data)

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """Mean over the samples of their weighted errors over kept patches."""
        x0 = batch.x0.float()
        # t = sigma / (1 + sigma) = sigmoid(ln sigma): the logit of t is normal
        t = sample_times(LogitNormal(self.mean, self.std), generator, batch.ids).to(x0.device)
        noise = randn(x0.shape, generator, x0.device)
        xt = interpolate(x0, noise, t)
        kept = draw_mask(self.mask, x0, self.patch_size, generator)
        velocity = denoiser(xt.to(batch.x0.dtype), t, with_mask(batch.cond, kept)).float()
        errors = sample_errors(denoised_from_velocity(xt, velocity, t) - x0, kept, self.patch_size)
        return LossResult((errors * self.weight(t / (1 - t))).mean())

    def weight(self, sigma: Tensor) -> Tensor:
        """(sigma^2 + s^2) / (sigma s)^2: with it the network's own error counts alike at every level."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


def spread_of(latents: Tensor) -> float:
    """Standard deviation of latents (S, ...), to be given as `sigma_data`."""
    return float(torch.as_tensor(latents).float().std())
