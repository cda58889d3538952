"""The time convention of smalti and the dialects of others, each converted in one place.

Ours: t in [0, 1], 0 = data, 1 = noise, `xt = (1 - t) * x0 + t * noise`, `velocity = noise - x0`
(rectified flow, arXiv 2209.03003; linear path of flow matching, arXiv 2210.02747).

A Gaussian process `z = alpha * x0 + sigma * noise` (variance preserving, or EDM with alpha = 1) is the same path seen
at another scale: with `t = sigma / (alpha + sigma)`, `z / (alpha + sigma)` equals `xt`.
"""

import torch
from torch import Tensor


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Times (B,), (B, F) made broadcastable with `like` (B, ...); (B, F) lies along dim 2 of (B, C, F, H, W)."""
    if t.ndim == 2 and like.ndim == 5:
        return t[:, None, :, None, None]
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point xt on the straight path between data and noise; shapes of x0, noise (B, ...), t as in `expand_time`."""
    t = expand_time(t, x0)
    return (1 - t) * x0 + t * noise


def denoised_from_velocity(xt: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The estimate of x0: `xt - t * velocity`."""
    return xt - expand_time(t, xt) * velocity


def noise_from_velocity(xt: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The estimate of the noise: `xt + (1 - t) * velocity`."""
    return xt + (1 - expand_time(t, xt)) * velocity


def score_from_velocity(xt: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The score of the marginal at t: `-noise / t` (SiT, arXiv 2401.08740, eq. 9 for the linear path); t > 0."""
    return -noise_from_velocity(xt, velocity, t) / expand_time(t, xt)


def time_from_alpha_sigma(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Our time of a Gaussian process with these coefficients: `sigma / (alpha + sigma)`."""
    return sigma / (alpha + sigma)


def time_from_timestep(timestep: Tensor, count: int = 1000) -> Tensor:
    """Timesteps 0..count of flow models in diffusers to t in [0, 1]."""
    return timestep.to(torch.float32) / count


def timestep_from_time(t: Tensor, count: int = 1000) -> Tensor:
    """t in [0, 1] to the timesteps 0..count of flow models in diffusers."""
    return t * count


def reverse_time(t: Tensor) -> Tensor:
    """Between ours and the convention 0 = noise, 1 = data (SiT, flow_matching); a velocity changes its sign with it."""
    return 1 - t


def velocity_from_eps(z: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Velocity of our path from a noise prediction at z = alpha * x0 + sigma * noise; alpha, sigma (B,), alpha > 0."""
    alpha, sigma = expand_time(alpha, z), expand_time(sigma, z)
    return eps - (z - sigma * eps) / alpha


def eps_from_velocity(z: Tensor, velocity: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Inverse of `velocity_from_eps`: the noise is `(z + alpha * velocity) / (alpha + sigma)`."""
    alpha, sigma = expand_time(alpha, z), expand_time(sigma, z)
    return (z + alpha * velocity) / (alpha + sigma)


def velocity_from_v(z: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Velocity of our path from v = alpha * noise - sigma * x0 (arXiv 2202.00512, app. D); alpha^2 + sigma^2 = 1."""
    alpha, sigma = expand_time(alpha, z), expand_time(sigma, z)
    return (sigma * z + alpha * v) - (alpha * z - sigma * v)


def v_from_velocity(z: Tensor, velocity: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Inverse of `velocity_from_v`."""
    noise = eps_from_velocity(z, velocity, alpha, sigma)
    alpha, sigma = expand_time(alpha, z), expand_time(sigma, z)
    return alpha * noise - sigma * (noise - velocity)


def velocity_from_denoised(z: Tensor, denoised: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Velocity of our path from an estimate of x0, as EDM models give it (arXiv 2206.00364); sigma > 0."""
    alpha, sigma = expand_time(alpha, z), expand_time(sigma, z)
    return (z - alpha * denoised) / sigma - denoised
