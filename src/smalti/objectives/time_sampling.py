"""At which times a flow model is trained: distributions of t on (0, 1), where 0 = data and 1 = noise.

A distribution is its quantile function, applied to uniform numbers u: uniform, `sigmoid(mean + std * Phi^-1(u))`
(logit-normal), or another one shifted towards noise by `t' = s * t / (1 + (s - 1) * t)`. Each sample draws its u from
its own generator; stratified draws use `u = (id mod K + u) / K`, so that K samples with consecutive ids cover (0, 1)
evenly however they are split into batches.

Source: logit-normal and shift, arXiv 2403.03206, section 3.1 and eq. 23; stratified times, arXiv 2107.00630, appendix
I.1 (there one random offset a batch, here one jitter a sample, which needs no common draw between processes).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Generators
from smalti.core.seeds import rand

Time = TypeVar("Time", float, Tensor)

MARGIN = 1e-6
"""Times stay this far from 0 and 1, where scores and estimates of x0 are singular."""


@runtime_checkable
class TimeDistribution(Protocol):
    """A distribution on (0, 1) given by its quantile function."""

    def quantile(self, u: Tensor) -> Tensor:
        """Times t of the same shape as the probabilities u in (0, 1)."""
        ...


@dataclass(frozen=True)
class Uniform:
    """All times alike."""

    def quantile(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormal:
    """`t = sigmoid(z)` with z normal: most training in the middle of the path.

    Args:
        mean: mean of z; above 0 leans to noise.
        std: standard deviation of z, above 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise UserError(
                f"logit-normal times got mean {self.mean}, std {self.std}; give finite ones with std above 0"
            )

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Shifted:
    """Another distribution moved towards noise (shift > 1) or data (shift < 1), as larger pictures need.

    Args:
        base: the distribution before the shift.
        shift: s in the paper, above 0.
    """

    base: TimeDistribution
    shift: float = 1.0

    def __post_init__(self):
        check_shift(self.shift)

    def quantile(self, u: Tensor) -> Tensor:
        return shift_time(self.base.quantile(u), self.shift)


def shift_time(t: Time, shift: float) -> Time:
    """`shift * t / (1 + (shift - 1) * t)` for t of any shape in [0, 1]; its inverse is the shift `1 / shift`."""
    return t if shift == 1 else t / (t + (1 - t) / shift)  # this form is exact at both ends


def dimension_shift(shape: Sequence[int], base: int = 4096) -> float:
    """The shift for latents of so many numbers, `sqrt(m / base)` for m of them, and 1 where m is below the base.

    The more numbers a sample has, the less of it the same share of noise hides. The same shift belongs to the training
    times and to the schedule of sampling.

    Args:
        shape: of one sample, such as (C, h, w).
        base: numbers of a sample at which nothing is shifted (4,096 = 32 x 32 x 4, the latents of a KL autoencoder).

    Source: RAE (arXiv 2510.11690), section 4.2.

    Example:
        >>> round(dimension_shift((768, 16, 16)), 2)
        6.93
    """
    return max(1.0, math.sqrt(math.prod(shape) / base))


def check_shift(shift: float) -> float:
    """The shift itself; raises `UserError` unless it is finite and above 0."""
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(f"time shift {shift} is out of range; choose a finite one above 0 (1 changes nothing)")
    return shift


def sample_times(distribution: TimeDistribution, generator: Generators, ids: Tensor, strata: int = 1) -> Tensor:
    """Draws one time for each sample.

    Args:
        distribution: where the times lie.
        generator: one generator, or one for each sample; each gives one uniform number.
        ids: names of the sample draws (B,), long; consecutive ids fall into consecutive strata.
        strata: number of strata K; 1 draws independently, the global batch size covers each batch evenly.

    Returns:
        t (B,), float32 on the CPU, in [1e-6, 1 - 1e-6].
    """
    u = rand((len(ids),), generator).double()
    if strata > 1:
        u = (ids.cpu() % strata + u) / strata
    t = distribution.quantile(u.clamp(1e-9, 1 - 1e-9))
    return t.clamp(MARGIN, 1 - MARGIN).float()
