"""A noisy sample once more, with less noise: the same data and the same noise at an earlier time.

On the straight path `xt = (1 - t) x0 + t noise`, so the point at s is `x0 + (s / t) (xt - x0)`: no noise need be known,
and nothing is divided by what may be small but t itself, which s never exceeds.

Source: SRA (arXiv 2505.02831), section 3.2: `s = clamp(t - u * largest, 0, 1)` with u uniform, for each sample its own.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Generators
from smalti.core.seeds import rand, randn
from smalti.core.time import expand_time, interpolate


class Earlier(NamedTuple):
    """The sample with less noise (B, ...), and its times in the shape that t had."""

    x: Tensor
    t: Tensor


class NoisePairs(Protocol):
    """Gives a noisy sample with less noise."""

    def draw(self, x0: Tensor, x: Tensor, t: Tensor, generator: Generators) -> Earlier: ...


@dataclass(frozen=True)
class StraightPairs:
    """Pairs on the straight path of flow matching.

    Args:
        largest: how much earlier at most, in (0, 1]; t_max in the paper.
        has_own_noise: the earlier sample gets other noise: a control, which cannot work as well.
    """

    largest: float = 0.2
    has_own_noise: bool = False

    def __post_init__(self):
        if not 0 < self.largest <= 1:
            raise UserError(f"largest is {self.largest}; times differ by at most so much, above 0 and up to 1")

    def draw(self, x0: Tensor, x: Tensor, t: Tensor, generator: Generators) -> Earlier:
        """Draws an earlier time for each sample and gives the sample there.

        Args:
            x0: data (B, ...).
            x: the noisy sample (B, ...) at t.
            t: times in (0, 1], (B,) or (B, N).
            generator: gives each sample its u.
        """
        u = rand((len(t),), generator).to(t.device).reshape(-1, *[1] * (t.ndim - 1))
        s = (t - self.largest * u).clamp(0, 1)
        if self.has_own_noise:
            return Earlier(interpolate(x0, randn(x0.shape, generator, x0.device), s), s)
        return Earlier(x0 + expand_time(s / t, x0) * (x - x0), s)
