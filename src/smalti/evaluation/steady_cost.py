"""What drawing costs under a method once everything that happens a single time at a new shape lies behind."""

from dataclasses import dataclass
from typing import Any

from smalti.core.method import Method
from smalti.evaluation.flops import Flops, count_flops
from smalti.evaluation.held_out_prompts import Prompts, draw_latents
from smalti.evaluation.timing import median_seconds
from smalti.seams.apply import apply


@dataclass(frozen=True)
class SteadyCost:
    """FLOPs of a whole run, and median seconds of one of fewer steps."""

    flops: Flops
    seconds: float


def steady_cost(
    pipe: Any, method: Method, prompts: Prompts, steps: int, timed: int = 8, repeats: int = 5
) -> SteadyCost:
    """Counts and times drawing, after a run in which the layout of tokens is read, which costs a step or two.

    Args:
        pipe: a pipeline.
        method: a neutral one for the plain model.
        prompts: drawn in one batch without guidance.
        steps: of the run whose FLOPs are counted.
        timed: steps of the runs that are timed.
        repeats: of these.
    """

    def draw(some: int) -> object:
        return draw_latents(pipe, prompts, some, guidance_scale=1.0)

    with apply(pipe, method):
        draw(timed)
        return SteadyCost(count_flops(lambda: draw(steps)), median_seconds(lambda: draw(timed), repeats, warmup=1))
