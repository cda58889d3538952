"""Learning-rate schedules as pure functions of the step, as `torch.optim.lr_scheduler.LambdaLR` takes them.

Inverse square root: linear warm-up over w steps, then `sqrt(w / step)`, the schedule of translation models
(arXiv 1706.03762, section 5.3, eq. 3, whose peak is put apart here).
"""

from collections.abc import Callable

from smalti.core.errors import UserError


def inverse_sqrt(warmup: int) -> Callable[[int], float]:
    """A function from the step, counted from 0, to the factor on the peak rate.

    Args:
        warmup: w, at least 1; the peak is reached at step w - 1.

    Raises:
        UserError: there is no warm-up, and so no scale for the decay.

    Example:
        >>> factor = inverse_sqrt(4)
        >>> [round(factor(step), 2) for step in (0, 3, 15)]
        [0.25, 1.0, 0.5]
    """
    if warmup < 1:
        raise UserError(f"warmup is {warmup}; the inverse square root is counted in warm-up steps, give at least 1")

    def factor(step: int) -> float:
        return min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)

    return factor
