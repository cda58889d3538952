"""Thresholds of caches, found by bisection: the one that skips a stated share, or ends at a stated distance.

Useful thresholds differ by orders of magnitude between models, and what a user knows is how much to save or how far a
picture may move. Each trial draws the calibration prompts once; thresholds are halved in their logarithm.

Example:
    >>> found = calibrate(pipe, lambda tau: ConfidenceGatedTaylor(tau), ["a red heart", "panda"], distance=0.05)
    >>> smalti.apply(pipe, ConfidenceGatedTaylor(found.threshold))
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from smalti.core.errors import NeverEngaged, UserError
from smalti.core.method import Method
from smalti.core.seeds import generators_for
from smalti.evaluation.same_cost import relative_distances
from smalti.seams.apply import apply

Quantity = Literal["skip", "distance", "psnr"]
Draw = Callable[[], Tensor]
"""Draws one prompt: (B, ...), the same at every call."""


@dataclass(frozen=True)
class Calibration:
    """The threshold that came nearest.

    Args:
        threshold: to be used.
        value: what was measured with it.
        target: what was asked for.
        is_met: whether the value lies within the tolerance of the target.
        tried: every threshold with its value, in order.
    """

    threshold: float
    value: float
    target: float
    is_met: bool
    tried: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Accelerated:
    """What a method drew.

    Args:
        skipped: share of model calls in which it noted an event.
        distances: relative L2 distance of every result to that of the full run, ||x - full|| / ||full||.
        psnr: peak signal-to-noise ratio of every result to that of the full run in dB, for pictures in [0, 1].
    """

    skipped: float
    distances: tuple[float, ...]
    psnr: tuple[float, ...]

    def mean(self, quantity: Quantity) -> float:
        """The share, or a mean over all results."""
        if quantity == "skip":
            return self.skipped
        values = self.distances if quantity == "distance" else self.psnr
        return sum(values) / len(values)


def calibrate(
    pipe: Any,
    make: Callable[[float], Method],
    prompts: Sequence[Any],
    *,
    skip: float | None = None,
    distance: float | None = None,
    psnr: float | None = None,
    between: tuple[float, float] = (1e-3, 10.0),
    within: float = 0.05,
    trials: int = 12,
    first_seed: int = 0,
    **settings: Any,
) -> Calibration:
    """Finds the threshold at which a method meets one target on a pipeline.

    Args:
        pipe: a diffusers pipeline.
        make: the method of a threshold; a larger one must skip more.
        prompts: first arguments of the pipeline, drawn one by one; 30 say much about other prompts, 3 little.
        skip: share of model calls to be skipped, for methods that note one event in each.
        distance: relative L2 distance of the final latents to the full run, mean over prompts.
        psnr: in dB of the decoded pictures, likewise.
        between: where the threshold is looked for.
        within: largest share by which the value may miss the target.
        trials: most thresholds that are tried.
        first_seed: of the first prompt's noise; the others follow.
        settings: further arguments of the pipeline, such as num_inference_steps.

    Raises:
        UserError: not exactly one target, or no threshold meets it; the message says how near the best one comes.
    """
    targets: dict[Quantity, float | None] = {"skip": skip, "distance": distance, "psnr": psnr}
    asked: dict[Quantity, float] = {name: value for name, value in targets.items() if value is not None}
    if len(asked) != 1 or not min(asked.values()) > 0 or not prompts:
        raise UserError(f"got the targets {asked} for {len(prompts)} prompts; give one target above 0, and prompts")
    [(quantity, target)] = asked.items()
    kind = "pt" if quantity == "psnr" else "latent"

    def draw(index: int) -> Tensor:
        generator = generators_for([first_seed + index])[0]
        return pipe(prompts[index], generator=generator, output_type=kind, return_dict=False, **settings)[0]

    draws = [partial(draw, index) for index in range(len(prompts))]
    full = [one() for one in draws]
    found = find_threshold(
        lambda threshold: accelerated(pipe, make(threshold), draws, full).mean(quantity),
        target, between, within, trials, rises=quantity != "psnr",
    )  # fmt: skip
    if not found.is_met:
        raise UserError(
            f"no threshold between {between[0]:g} and {between[1]:g} gives a {quantity} of {target:g}: the nearest of "
            f"{len(found.tried)} tried is {found.value:.4g}, at {found.threshold:.4g}"
        )
    return found


def find_threshold(
    measure: Callable[[float], float],
    target: float,
    between: tuple[float, float],
    within: float = 0.05,
    trials: int = 12,
    rises: bool = True,
) -> Calibration:
    """Bisects the logarithm of a threshold until a measured value meets its target.

    Args:
        measure: value at a threshold; it rises (or falls) with it, and may do so in jumps.
        target: the value wanted.
        between: lowest and highest threshold, both above 0.
        within: largest |value / target - 1| that counts as met.
        trials: most calls of `measure`.
        rises: whether larger thresholds give larger values.
    """
    low, high = between
    if not 0 < low < high or trials < 1:
        raise UserError(f"got thresholds between {low} and {high} and {trials} trials; give 0 < low < high, 1 trial")
    tried: list[tuple[float, float]] = []
    while len(tried) < trials:
        threshold = math.sqrt(low * high)
        value = measure(threshold)
        tried.append((threshold, value))
        if _miss(value, target) <= within:
            break
        low, high = (threshold, high) if (value < target) == rises else (low, threshold)
    best = min(tried, key=lambda one: _miss(one[1], target))
    return Calibration(*best, target, _miss(best[1], target) <= within, tuple(tried))


def accelerated(target: Any, method: Method, draws: Sequence[Draw], full: Sequence[Tensor]) -> Accelerated:
    """Draws with a method and compares with what the plain model drew.

    Args:
        target: the pipeline or model that draws.
        method: notes one event in every model call that it skips; a run in which it never engages is a full one.
        draws: one for each prompt.
        full: results of the plain model (B, ...), one for each prompt.
    """
    distances, psnr = [], []
    handle = apply(target, method)
    try:
        for draw, plain in zip(draws, full, strict=True):
            try:
                result = draw()
            except NeverEngaged:
                result = plain
            distances += relative_distances(result, plain)
            error = (result - plain).square().mean().item()
            psnr.append(-10 * math.log10(error) if error else math.inf)
        report = handle.report()
    finally:
        handle.remove(check=False)
    skipped = sum(report.methods[0].events.values()) / report.calls
    if skipped > 1:
        raise UserError(f"{method} notes several events in a model call, so the share it skips cannot be told by them")
    return Accelerated(skipped, tuple(distances), tuple(psnr))


def _miss(value: float, target: float) -> float:
    """How far a value lies from its target, as a share of it."""
    return abs(value - target) / target
