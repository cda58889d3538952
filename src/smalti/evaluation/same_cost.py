"""An accelerated run beside the full one and beside fewer steps: how far each ends from the full run, at which cost.

All runs begin with the same noise. The distance is that of the final latents, for each sample
`||x - full|| / ||full||`; the cost is counted in FLOPs, and seconds are reported.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.evaluation.flops import count_flops


@dataclass(frozen=True)
class Measured:
    """One way of drawing.

    Args:
        latents: final latents (B, ...).
        flops: of the whole run, all samples together.
        seconds: wall time of a run whose FLOPs are not counted.
    """

    latents: Tensor
    flops: float
    seconds: float

    def distances(self, full: "Measured") -> list[float]:
        """Relative L2 distance to the full run for each sample."""
        return relative_distances(self.latents, full.latents)


def relative_distances(latents: Tensor, full: Tensor) -> list[float]:
    """||x - full|| / ||full|| for each sample of (B, ...)."""
    return ((latents - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)).tolist()


def measure(draw: Callable[[], Tensor]) -> Measured:
    """Draws twice: once for seconds, once counting FLOPs (which slows it down)."""
    started = time.perf_counter()
    latents = draw()
    if latents.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return Measured(latents, count_flops(draw).total, seconds)


def steps_of_equal_cost(full: Measured, steps: int, target: Measured) -> int:
    """The number of plain steps that costs at least as much as `target`: the comparator has the advantage."""
    return min(steps, math.ceil(steps * target.flops / full.flops))
