"""Whether one set of numbers lies below (or above) a factor of another, measured in pairs.

The pairs are prompts or seeds. For every pair the difference `ours - factor * theirs` is taken; its mean has a 95 %
interval, of Student's t for fewer than 16 pairs and by resampling pairs from 16 on. A claim holds if the whole interval
lies on its side of zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smalti.core.system import Check, Outcome

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 11: 2.228,
         12: 2.201, 13: 2.179, 14: 2.160, 15: 2.145}  # fmt: skip
"""97.5 % points of Student's t by number of pairs (one degree of freedom less)."""
RESAMPLES = 10_000
FEW = 16


@dataclass(frozen=True)
class Comparison:
    """How two sets compare.

    Args:
        outcome: holds, fails (the mean lies on the wrong side) or unresolved (the interval includes the threshold).
        ours: mean of ours.
        theirs: mean of theirs.
        low, high: 95 % interval of the mean of `ours - factor * theirs`.
        pairs: number of pairs.
    """

    outcome: Outcome
    ours: float
    theirs: float
    low: float
    high: float
    pairs: int

    def check(self, name: str, rule: str) -> Check:
        """Ours as a further figure of a claim."""
        return Check(name, self.ours, rule, self.outcome == "holds")


def compare(ours: Sequence[float], theirs: Sequence[float], factor: float = 1.0, below: bool = True) -> Comparison:
    """Compares paired numbers.

    Args:
        ours: one a pair.
        theirs: one a pair.
        factor: the claim is `ours < factor * theirs`.
        below: False turns the claim round: `ours > factor * theirs`.

    Raises:
        ValueError: fewer than 3 pairs, unequal lengths, or a number that is not finite.
    """
    one, other = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if one.shape != other.shape or one.ndim != 1 or len(one) < 3:
        raise ValueError(f"got {one.shape} and {other.shape} numbers; give as many of each, at least 3 pairs")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("a number is not finite; what produced it has failed")
    difference = one - factor * other
    low, high = interval_of_mean(difference)
    is_right = (high < 0) if below else (low > 0)
    is_wrong = difference.mean() >= 0 if below else difference.mean() <= 0
    outcome: Outcome = "holds" if is_right else "fails" if is_wrong else "unresolved"
    return Comparison(outcome, float(one.mean()), float(other.mean()), low, high, len(one))


def interval_of_mean(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of at least 2 values."""
    if len(values) < FEW:
        half = T_975[len(values)] * values.std(ddof=1) / math.sqrt(len(values))
        return float(values.mean() - half), float(values.mean() + half)
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)
