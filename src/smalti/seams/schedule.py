"""Which steps of a run a method leaves dense: the first and the last.

Their number is whole, or a share of the run below 1, rounded up; that needs a planned number of steps.
"""

import math

from smalti.core.errors import Refusal
from smalti.core.method import Moment


def is_early(moment: Moment, first: float) -> bool:
    """Whether a call lies in the first steps.

    Args:
        moment: of the call.
        first: a whole number of steps, or a share of all steps in (0, 1).

    Raises:
        Refusal: a share, and nobody said how many steps there are.
    """
    return moment.step < (math.ceil(first * _planned(moment)) if 0 < first < 1 else first)


def is_late(moment: Moment, last: float) -> bool:
    """Whether a call lies in the last steps, counted as in `is_early`.

    Raises:
        Refusal: nobody said how many steps there are.
    """
    if not last:
        return False
    planned = _planned(moment)
    return moment.step >= planned - (math.ceil(last * planned) if last < 1 else last)


def _planned(moment: Moment) -> int:
    if moment.steps is None:
        raise Refusal("a share of the steps, or the last ones, need their number; say it, with handle.run(steps=28)")
    return moment.steps
