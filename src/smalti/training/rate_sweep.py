"""Sweeps: the loss of short trainings over widths, learning rates and seeds, here or on a cluster.

What is tuned on a narrow model is worth something only if it may be taken to a wide one: `transfer_cost` says how much
loss that adds. Source of the question: arXiv 2505.15270, section 4.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from smalti.core.cluster import run_all
from smalti.core.errors import UserError


@dataclass(frozen=True)
class Sweep:
    """Losses by (width, rate), one a seed; those that are not finite count as infinite."""

    losses: Mapping[tuple[int, float], Sequence[float]]

    @property
    def widths(self) -> list[int]:
        """Rising."""
        return sorted({width for width, _ in self.losses})

    @property
    def rates(self) -> list[float]:
        """Rising."""
        return sorted({rate for _, rate in self.losses})

    def mean(self, width: int, rate: float) -> float:
        """Mean loss over seeds."""
        values = self.losses[width, rate]
        return fmean(values) if all(math.isfinite(one) for one in values) else math.inf

    def best(self, width: int) -> float:
        """The rate of the lowest mean loss."""
        return min(self.rates, key=lambda rate: self.mean(width, rate))

    def is_inside(self, width: int) -> bool:
        """Whether the best rate is neither the smallest nor the largest that was tried."""
        return self.rates[0] < self.best(width) < self.rates[-1]

    def transfer_cost(self, narrow: int, wide: int) -> list[float]:
        """For each seed: the wide one's loss with the narrow one's best rate, over that with its own best, less 1."""
        taken, own = self.losses[wide, self.best(narrow)], self.losses[wide, self.best(wide)]
        return [one / other - 1 if math.isfinite(one) else math.inf for one, other in zip(taken, own, strict=True)]

    def table(self) -> str:
        """Mean losses, a row a width; the best is marked."""
        lines = ["width  " + "  ".join(f"{rate:9.2e}" for rate in self.rates)]
        for width in self.widths:
            best = self.best(width)
            marked = [f"{self.mean(width, rate):8.4f}{'*' if rate == best else ' '}" for rate in self.rates]
            lines.append(f"{width:5}  " + "  ".join(marked))
        return "\n".join(lines)


def sweep(
    train: Callable[[int, float, int], float],
    widths: Sequence[int],
    rates: Sequence[float],
    seeds: Sequence[int] = (0,),
    cluster: str = "",
    workers: int = 2,
) -> Sweep:
    """Trains at every width and rate with every seed.

    Args:
        train: gives the loss of `train(width, rate, seed)`.
        widths: of the models.
        rates: peak learning rates.
        seeds: of each.
        cluster, workers: see `core.cluster.run_all`.

    Raises:
        UserError: nothing to train, or the cluster cannot be had.
    """
    jobs = [(width, rate, seed) for width in widths for rate in rates for seed in seeds]
    if not jobs:
        raise UserError("got no width, rate or seed to train at; give at least one of each")
    found: dict[int, float] = dict(run_all(lambda: lambda job: float(train(*job)), jobs, cluster, workers))
    losses: dict[tuple[int, float], list[float]] = {}
    for index, (width, rate, _) in enumerate(jobs):
        losses.setdefault((width, rate), []).append(found[index] if math.isfinite(found[index]) else math.inf)
    return Sweep(losses)


def transferred_share(cost_of_proxy: float, trials: int, cost_of_target: float) -> float:
    """What tuning on a proxy costs, as a share of one run of the target: `trials * proxy / target`."""
    return trials * cost_of_proxy / cost_of_target
