"""How evenly latents fill their space, as they look in two dimensions.

Latents of different pictures are laid out by t-SNE, a Gaussian kernel density is taken at every point of a grid over
them, and three figures say how uneven it is: the coefficient of variation (deviation over mean), the Gini coefficient
(0 = even, 1 = all in one place) and the normalised entropy (1 = even). Evenly filled latents are easier to learn to
draw.

Source: Reconstruction vs. Generation (arXiv 2501.01423), section 3.3 and table 2; t-SNE, van der Maaten and Hinton
2008, here exact (all pairs), so for at most some thousand points. The kernel's width follows Scott's rule, N^(-1/6).
"""

import math

import torch
from torch import Tensor

from smalti.core.errors import UserError

LARGEST, GRID = 4000, 32


def tsne(points: Tensor, perplexity: float = 30.0, steps: int = 300, seed: int = 0) -> Tensor:
    """Points (N, D) laid out in two dimensions (N, 2), so that neighbours stay neighbours.

    Args:
        points: at most 4,000.
        perplexity: about how many neighbours count, below N / 3.
        steps: of gradient descent with momentum, the first quarter with attraction four times as strong.
        seed: of the start.

    Raises:
        UserError: there are too many points, or too few for the perplexity.
    """
    count = len(points)
    if not 1 < perplexity < count / 3 or count > LARGEST:
        raise UserError(f"got {count} points with a perplexity of {perplexity}; give up to {LARGEST}, over three times")
    shared = _affinities(torch.cdist(points.double(), points.double()).square(), perplexity)
    y = 1e-4 * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    rate = max(count / 12 / 4, 50.0)
    for step in range(steps):
        early = step < steps // 4
        weights = (1 + torch.cdist(y, y).square()).reciprocal().fill_diagonal_(0)
        apart = weights / weights.sum()
        force = ((4.0 if early else 1.0) * shared - apart) * weights
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        same = gradient.sign() == velocity.sign()
        gains = torch.where(same, gains * 0.8, gains + 0.2).clamp_min(0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y


def density_figures(points: Tensor) -> dict[str, float]:
    """Unevenness of points (N, 2), N >= 10: "density variation", "density Gini", "density entropy".

    The density is taken over the box of the points, standardised by their deviations.
    """
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 10:
        raise UserError(f"got points of shape {tuple(points.shape)}; give (N, 2) with at least 10 points")
    points = points.double()
    points = (points - points.mean(0)) / points.std(0).clamp_min(1e-12)
    lines = [torch.linspace(float(axis.min()), float(axis.max()), GRID, dtype=torch.float64) for axis in points.T]
    places = torch.cartesian_prod(*lines)
    width = len(points) ** (-1 / 6)
    density = (-0.5 * (torch.cdist(places, points) / width).square()).exp().mean(1)
    share = density / density.sum()
    ordered, ranks = density.sort().values, torch.arange(1, len(density) + 1, dtype=torch.float64)
    gini = ((2 * ranks - len(density) - 1) * ordered).sum() / (len(density) * ordered.sum())
    return {
        "density variation": float(density.std() / density.mean()),
        "density Gini": float(gini),
        "density entropy": float(-(share * share.clamp_min(1e-300).log()).sum() / math.log(len(share))),
    }


def latent_uniformity(latents: Tensor, count: int = 1000, seed: int = 0) -> dict[str, float]:
    """The figures of latents (N, C, h, w): of one place of each picture, drawn at random, at most `count` of them."""
    generator = torch.Generator().manual_seed(seed)
    flat = latents.flatten(2)  # (N, C, h * w)
    chosen = torch.randperm(len(flat), generator=generator)[:count]
    places = torch.randint(flat.shape[2], (len(chosen),), generator=generator)
    return density_figures(tsne(flat[chosen, :, places], min(30.0, len(chosen) / 4), seed=seed))


def _affinities(squared: Tensor, perplexity: float) -> Tensor:
    """Symmetric shares (N, N) with sum 1 of neighbourhoods of this perplexity, by bisection of each width."""
    count, target = len(squared), math.log(perplexity)
    others = ~torch.eye(count, dtype=torch.bool)
    low, high = torch.zeros(count, dtype=torch.float64), torch.full((count,), math.inf, dtype=torch.float64)
    beta = 1 / squared.mean(1).clamp_min(1e-12)
    nearest = squared.masked_fill(~others, math.inf).amin(1, keepdim=True)
    share = torch.zeros_like(squared)
    for _ in range(50):
        share = ((nearest - squared) * beta[:, None]).exp() * others
        share = share / share.sum(1, keepdim=True)
        entropy = -(share * share.clamp_min(1e-300).log()).sum(1)
        wide = entropy > target
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    return (share + share.T) / (2 * count)
