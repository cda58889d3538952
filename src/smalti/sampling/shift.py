"""Schedules of time and their shift towards noise for larger pictures.

`t' = s t / (1 + (s - 1) t)`: with more tokens the same t hides less of the picture, because neighbouring tokens repeat
each other, so sampling and training spend more steps near noise. A model made for n tokens runs at m tokens with
`s = sqrt(m / n)` times its own shift.

Source: Stable Diffusion 3 (arXiv 2403.03206), section 5.3.2 and equation 23.
"""

import math

from smalti.core.errors import UserError
from smalti.objectives.time_sampling import shift_time


def shift_for_tokens(tokens: int, base_tokens: int, base_shift: float = 1.0) -> float:
    """Shift at `tokens` image tokens of a model whose shift at `base_tokens` is `base_shift`.

    Example:
        >>> shift_for_tokens(1024, 256, 1.5)
        3.0
    """
    if tokens < 1 or base_tokens < 1:
        raise UserError(f"got {tokens} tokens against {base_tokens}; both must be at least 1")
    return base_shift * math.sqrt(tokens / base_tokens)


def uniform_schedule(steps: int, shift: float = 1.0, start: float = 1.0, end: float = 0.0) -> list[float]:
    """`steps` + 1 times from `start` to `end`, evenly spaced and then shifted.

    Args:
        steps: number of steps, at least 1.
        shift: shift towards noise, above 0; 1 leaves the times evenly spaced.
        start: first time in [0, 1], before the shift.
        end: last time in [0, 1], before the shift; above `start` for inversion.

    Raises:
        UserError: steps, shift or an end is out of range.

    Example:
        >>> uniform_schedule(4)
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"got {steps!r} steps; choose a whole number of at least 1")
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(f"got a shift of {shift}; choose a number above 0")
    if not (0 <= start <= 1 and 0 <= end <= 1) or start == end:
        raise UserError(f"got a schedule from {start} to {end}; choose two different times in [0, 1]")
    times = [start + (end - start) * step / steps for step in range(steps)] + [end]
    return [shift_time(t, shift) for t in times]
