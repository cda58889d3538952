"""DDPM: a network learns the noise, and how uncertain a backward step is if wanted.

    L_simple = E |eps(z_i, i) - noise|^2,      L = L_simple + weight * T * E L_i

where L_i is the term of the variational bound at timestep i, in bits a dimension: the divergence of the network's
backward step from the true one, at i = 0 the likelihood of data in bins of 2/255 on [-1, 1]. The bound teaches only
the variance, `log var = f log beta_i + (1 - f) log posterior_i` with `f = (output + 1) / 2`, and not the mean.

The network speaks another dialect than a denoiser: it is called with z, the timestep over T and cond, and returns the
noise (with a variance: twice the channels). `EpsDenoiser` makes it a denoiser of ours.

Source: DDPM (arXiv 2006.11239), equation 14 and section 3.3; learned variances, arXiv 2102.09672, equations 15 and 16,
whose weight of 0.001 counts the sum over timesteps; DiT (arXiv 2212.09748) trains with it in latents.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, Denoiser, Generators, LossResult, TrainState
from smalti.core.seeds import rand, randn
from smalti.core.time import velocity_from_eps
from smalti.objectives.beta_process import BetaProcess, take

BIN = 1 / 255


@dataclass(frozen=True)
class DDPM:
    """The objective.

    Args:
        process: its timesteps.
        learned_variance: whether the second half of the network's channels is f, as above.
        vlb_weight: of the bound, summed over all timesteps.
    """

    process: BetaProcess = field(default_factory=BetaProcess)
    learned_variance: bool = False
    vlb_weight: float = 1e-3

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """Mean over the samples; `denoiser` is the network, `(z, i / T, cond) -> noise`.

        Raises:
            UserError: the network's channels do not fit.
        """
        x0, count = batch.x0.float(), self.process.count
        index = (rand((len(x0),), generator).double() * count).long().to(x0.device)
        noise = randn(x0.shape, generator, x0.device)
        z = take(self.process.alphas, index, x0) * x0 + take(self.process.sigmas, index, x0) * noise
        output = denoiser(z.to(batch.x0.dtype), index / count, batch.cond).float()
        wanted = x0.shape[1] * (2 if self.learned_variance else 1)
        if output.shape[1] != wanted:
            raise UserError(f"got {output.shape[1]} channels from the network, not {wanted}; see learned_variance")
        eps = output[:, : x0.shape[1]]
        simple = (eps - noise).square().mean()
        if not self.learned_variance:
            return LossResult(simple)
        bound = variational_bound(self.process, x0, z, index, eps.detach(), output[:, x0.shape[1] :]).mean()
        return LossResult(simple + self.vlb_weight * count * bound, {"noise": simple.detach(), "bound": bound.detach()})


def variational_bound(
    process: BetaProcess, x0: Tensor, z: Tensor, index: Tensor, eps: Tensor, output: Tensor
) -> Tensor:
    """L_i (B,) in bits a dimension.

    Args:
        process: its timesteps.
        x0, z: data and what is seen of them (B, ...).
        index: timesteps i (B,) long.
        eps: the network's noise (B, ...).
        output: its second half (B, ...), -1 = the posterior's variance, 1 = beta.
    """
    estimate = (z - take(process.sigmas, index, z) * eps) / take(process.alphas, index, z)
    mean, log_variance = process.posterior_mean(estimate, z, index), step_log_variance(process, index, output)
    true_mean = process.posterior_mean(x0, z, index)
    true = take(process.posterior_variances.log(), index, z)
    divergence = (log_variance - true - 1 + (true - log_variance).exp()) / 2
    divergence = divergence + (true_mean - mean).square() * (-log_variance).exp() / 2
    at_data = -binned_log_likelihood(x0, mean, log_variance / 2)
    first = (index == 0).reshape(-1, *[1] * (z.ndim - 1))
    return torch.where(first, at_data, divergence).flatten(1).mean(1) / math.log(2)


def step_log_variance(process: BetaProcess, index: Tensor, output: Tensor) -> Tensor:
    """log var (B, ...) of a backward step from the network's second half (B, ...) at timesteps (B,)."""
    share = (output + 1) / 2
    largest = take(process.betas.log(), index, output)
    smallest = take(process.posterior_variances.log(), index, output)
    return share * largest + (1 - share) * smallest


def binned_log_likelihood(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """log of a normal's mass (B, ...) in the bins of width 2/255 around x, the outermost ones open."""
    normal = torch.distributions.Normal(mean, log_deviation.exp())
    above = torch.where(x > 0.999, 1.0, normal.cdf(x + BIN))
    below = torch.where(x < -0.999, 0.0, normal.cdf(x - BIN))
    return (above - below).clamp_min(1e-12).log()


class EpsDenoiser(nn.Module):
    """A network of noise as a denoiser of ours, `(x, t, cond) -> velocity`.

    Args:
        network: `(z (B, C, ...), i / T, cond) -> noise (B, C or 2 C, ...)`; a variance is left out.
        process: that it was trained with; times outside of it count as its nearest one.
    """

    def __init__(self, network: nn.Module, process: BetaProcess):
        super().__init__()
        self.network, self.process = network, process

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity (B, C, ...)."""
        t = t.float().clamp(max=float(self.process.times[-1]))  # at t = 1 nothing would be left of the data
        length = ((1 - t).square() + t.square()).sqrt()
        z = x / length.reshape(-1, *[1] * (x.ndim - 1))
        eps = self.network(z, self.process.timestep(t) / self.process.count, cond)[:, : x.shape[1]]
        return velocity_from_eps(z, eps, (1 - t) / length, t / length)
