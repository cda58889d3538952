"""Why a small loss in latent space is a small distance between pictures: both parts of the bound, measured.

    W2(data, drawn)^2 <= const * (reconstruction + gain^2 e^(1 + 2 L) * matching)

`reconstruction` is the mean squared distance of pictures to what the autoencoder makes of them, `matching` that of the
field's velocities to the true ones, both summed over all values of a sample; `gain` is the Lipschitz constant of the
decoder and L that of the field. The two constants are estimated from below, at samples, as the largest stretch of a
small step; so the figures tell which part limits a model and do not certify a distance. The constant in front, and
whether the exponent is exactly this, the report leaves open.

Source: LFM (arXiv 2307.08698), its theorem on the Wasserstein distance of decoded samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.core.protocols import Batch, Denoiser
from smalti.core.seeds import generators_for, randn
from smalti.core.time import interpolate
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.time_sampling import Uniform

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BoundReport:
    """Parts of the bound.

    Args:
        reconstruction: E |x - D(E(x))|^2 of a picture.
        matching: E |v - u|^2 of a sample of latents, over uniform times.
        decoder_gain: largest stretch of the decoder that was seen.
        field_gain: L, largest stretch of the field that was seen.
    """

    reconstruction: float
    matching: float
    decoder_gain: float
    field_gain: float

    @property
    def decades(self) -> float:
        """log10 of the bracket; it is large, because e^(2 L) is."""
        latent = 2 * math.log(self.decoder_gain) + 1 + 2 * self.field_gain + math.log(max(self.matching, 1e-30))
        pixels = math.log(max(self.reconstruction, 1e-30))
        most = max(latent, pixels)
        return (most + math.log(math.exp(latent - most) + math.exp(pixels - most))) / math.log(10)

    def __str__(self) -> str:
        return (
            f"reconstruction {self.reconstruction:.4g} + gain^2 e^(1+2L) * matching {self.matching:.4g} "
            f"(gain {self.decoder_gain:.3g}, L {self.field_gain:.3g}), about 10^{self.decades:.1f}"
        )


def bound_report(
    autoencoder: Any, denoiser: Denoiser, pixels: Tensor, batch: Batch, floor: float = 1e-5, samples: int = 16
) -> BoundReport:
    """Measures both parts.

    Args:
        autoencoder: such as `ConvAutoencoder`: `encode`, `decode`, `denormalise`, `reconstruct`.
        denoiser: the field, `(x, t, cond) -> velocity`.
        pixels: pictures (N, 3, H, W) in [-1, 1].
        batch: latents (B, C, h, w) with their conditions.
        floor: of the objective.
        samples: from each of which the two constants are estimated.
    """
    with torch.no_grad():
        encoded = autoencoder.encode(pixels)
        errors = (autoencoder.decode(encoded) - pixels).square().flatten(1).sum(1)
        seeds = generators_for(batch.ids.tolist())
        matching, _ = FlowMatching(Uniform(), floor=floor).errors(denoiser, batch, seeds)
    some = batch[slice(0, samples)]
    noise = randn(some.x0.shape, generators_for(some.ids.tolist())).to(some.x0)

    def field(t: float) -> float:
        times = torch.full((len(some.x0),), t, device=some.x0.device)
        return stretch(lambda x: denoiser(x, times, some.cond), interpolate(some.x0, noise, times))

    return BoundReport(
        reconstruction=float(errors.mean()),
        matching=float(matching.mean()) * batch.x0[0].numel(),
        decoder_gain=stretch(lambda z: autoencoder.reconstruct(autoencoder.denormalise(z)), some.x0),
        field_gain=max(field(t) for t in (0.1, 0.5, 0.9)),
    )


def stretch(
    function: Function, points: Tensor, rounds: int = 12, step: float = 1e-2, seeds: Sequence[int] = ()
) -> float:
    """The largest local Lipschitz constant that is found at points (B, ...), by the power method.

    A small step along v and the gradient back, `v <- J^T (f(x + h v) - f(x)) / h`, turn v into the direction that the
    function stretches most.

    Args:
        function: of each sample by itself, (B, ...) -> (B, ...), differentiable.
        points: x.
        rounds: of the power method.
        step: h, in units of x.
        seeds: one for each sample's first direction; 0, 1, ... if empty.
    """
    direction = _unit(randn(points.shape, generators_for(list(seeds) or list(range(len(points))))).to(points))
    found = torch.zeros(len(points))
    for _ in range(rounds):
        x = points.detach().clone().requires_grad_(True)
        value = function(x)
        moved = ((function(points + step * direction) - value) / step).detach()
        found = torch.maximum(found, moved.flatten(1).norm(dim=1).cpu())
        (back,) = torch.autograd.grad(value, x, moved)
        direction = _unit(back)
    return float(found.max())


def _unit(x: Tensor) -> Tensor:
    """Samples (B, ...) of length 1."""
    return x / x.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, *[1] * (x.ndim - 1))
