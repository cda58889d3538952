"""Wall time of callables, and ratios that are fair: both sides run in turn, so drift of the machine hits both."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from smalti.core.errors import UserError
from smalti.core.system import Outcome


@dataclass(frozen=True)
class Ratio:
    """How long the first callable takes in units of the second.

    Args:
        median: median over pairs of first / second.
        low: lower end of the 95 % bootstrap interval of the median.
        high: upper end.
        first: median seconds of the first callable.
        second: median seconds of the second.
        pairs: number of pairs measured.
    """

    median: float
    low: float
    high: float
    first: float
    second: float
    pairs: int

    def outcome(self, threshold: float, below: bool = False) -> Outcome:
        """Whether the ratio lies above a threshold (or below it), with its whole interval."""
        is_right = self.high < threshold if below else self.low > threshold
        is_wrong = self.median >= threshold if below else self.median <= threshold
        return "holds" if is_right else "fails" if is_wrong else "unresolved"

    @property
    def reaches_one(self) -> bool:
        """Whether the first may be as fast as the second: the interval's lower end is at most 1."""
        return self.low <= 1.0


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, devices synchronised before and after."""
    _synchronise()
    start = time.perf_counter()
    function()
    _synchronise()
    return time.perf_counter() - start


def median_seconds(function: Callable[[], object], repeats: int = 10, warmup: int = 2) -> float:
    """Median wall time of a call after warm-up calls that do not count."""
    _check(repeats, warmup)
    for _ in range(warmup):
        function()
    return _median([seconds(function) for _ in range(repeats)])


def paired_ratio(
    first: Callable[[], object],
    second: Callable[[], object],
    repeats: int = 10,
    warmup: int = 2,
    seed: int = 0,
    resamples: int = 2000,
) -> Ratio:
    """Times two callables in turn, the order swapped in every other pair, and bootstraps the median of their ratios."""
    _check(repeats, warmup)
    for _ in range(warmup):
        first()
        second()
    times: list[tuple[float, float]] = []
    for pair in range(repeats):
        if pair % 2:
            late = seconds(second)
            times.append((seconds(first), late))
        else:
            times.append((seconds(first), seconds(second)))
    ratios = [one / other for one, other in times]
    low, high = bootstrap_interval(ratios, seed, resamples)
    firsts, seconds_ = zip(*times)
    return Ratio(_median(ratios), low, high, _median(firsts), _median(seconds_), repeats)


def bootstrap_interval(values: list[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the median of values by resampling them with replacement."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor(values, dtype=torch.float64)
    index = torch.randint(len(values), (resamples, len(values)), generator=generator)
    medians = table[index].quantile(0.5, dim=1)
    return float(medians.quantile(0.025)), float(medians.quantile(0.975))


def _median(values) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(0.5))


def _check(repeats: int, warmup: int) -> None:
    if repeats < 1 or warmup < 0:
        raise UserError(f"got {repeats} repeats and {warmup} warm-up calls; choose at least 1 and 0")


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
