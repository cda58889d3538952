"""Ways to draw with one pipeline, measured beside its plain run: methods, fewer steps, other solvers, partial guidance.

Seconds are those of one call; the plain run is timed anew from time to time, because machines drift. The distance is
that of the final latents, ||x - plain|| / ||plain||, mean over prompts; PSNR in dB is that of the pictures.
"""

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np

from smalti.core.errors import NeverEngaged, Refusal
from smalti.core.method import Method
from smalti.core.seeds import generators_for
from smalti.evaluation.same_cost import relative_distances
from smalti.evaluation.timing import paired_ratio, seconds
from smalti.sampling.schedulers import make_scheduler
from smalti.seams.anatomy import read_anatomy
from smalti.seams.apply import apply, denoisers
from smalti.seams.find import words_of
from smalti.seams.handle import shape_of

STALE = 20.0
"""Seconds after which the plain run is timed again, because machines drift."""


@dataclass(frozen=True)
class Way:
    """One way to draw: methods, a number of steps, and for our own pipelines solver and guidance interval."""

    methods: tuple[Method, ...] = ()
    steps: int = 28
    solver: str = ""
    interval: tuple[float, float] = (0.0, 1.0)

    @property
    def name(self) -> str:
        """For tables, and the key of what was measured."""
        parts = [words_of(method) for method in self.methods] + [f"{self.steps} steps"]
        parts += [self.solver] if self.solver else []
        parts += [f"guided for t in {list(self.interval)}"] if self.interval != (0.0, 1.0) else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Trial:
    """A measured way: times faster than the plain run, distance to it, PSNR where that is the target."""

    way: Way
    speedup: float
    distance: float
    psnr: float = math.nan

    def as_json(self) -> dict[str, Any]:
        """For a plan file; figures that are not known are left out."""
        figures = {"speedup": self.speedup, "distance": self.distance, "psnr": self.psnr}
        shown = {name: round(value, 4) for name, value in figures.items() if math.isfinite(value)}
        return {"way": self.way.name, **shown}


@dataclass
class Bench:
    """A pipeline with its prompts.

    Args:
        pipe: the pipeline.
        calls: arguments of its call for each prompt, with a `seed`.
        plain: how it is drawn without help.
        batch: prompts in a call.
        with_pictures: whether PSNR is measured, too.
        kept_limit: most bytes that methods may keep; None = any.
        known: what was measured, by way and number of prompts; kept between runs by the planner.
        results: what the plain pipeline drew, by number of prompts.
        clock: when the plain pipeline was last timed on the first batch, and its seconds.
    """

    pipe: Any
    calls: Sequence[Mapping[str, Any]]
    plain: Way
    batch: int = 1
    with_pictures: bool = False
    kept_limit: float | None = None
    known: dict[str, list[float]] = field(default_factory=dict)
    results: dict[int, list[list[Any]]] = field(default_factory=dict)
    clock: tuple[float, float] = (-math.inf, 0.0)

    def draw(self, way: Way, indices: Sequence[int], kind: str = "latent") -> Any:
        """What the pipeline gives for a batch of prompts: latents (B, ...), or pictures as an array."""
        calls = [self.calls[index] for index in indices]
        arguments: dict[str, Any] = {**calls[0]}
        seeds = [call["seed"] for call in calls]
        del arguments["seed"]
        if self.batch > 1:
            arguments |= {name: [call[name] for call in calls] for name in ("prompt", "style") if name in arguments}
        if way.interval != (0.0, 1.0):
            arguments["guidance_interval"] = way.interval
        before = self.pipe.scheduler if way.solver else None
        with ExitStack() as stack:
            if way.solver:
                self.pipe.register_modules(scheduler=make_scheduler(way.solver))
                stack.callback(self.pipe.register_modules, scheduler=before)
            handle = stack.enter_context(apply(self.pipe, *way.methods)) if way.methods else None
            drawn = self.pipe(
                **arguments, num_inference_steps=way.steps, generator=generators_for(seeds), output_type=kind,
                return_dict=False,
            )[0]  # fmt: skip
            if handle is not None and self.kept_limit is not None:
                kept = sum(one.kept for one in handle.report().methods)
                if kept > self.kept_limit:
                    raise Refusal(f"{way.name} keeps {kept / 2**30:.2f} GiB; {self.kept_limit / 2**30:.2f} are allowed")
        return drawn

    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of the model's sample in the plain run, without its batch; None where it is no tensor."""
        seen: list[tuple[int, ...]] = []
        model = denoisers(self.pipe)[0]
        names, sample = list(inspect.signature(model.forward).parameters), read_anatomy(model).sample

        def look(module: Any, args: tuple, kwargs: dict) -> None:
            seen.append(shape_of({**dict(zip(names, args, strict=False)), **kwargs}.get(sample)))

        hook = model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.draw(replace(self.plain, steps=2), self.batches(1)[0])
        finally:
            hook.remove()
        return seen[0][1:] or None

    def batches(self, count: int) -> list[list[int]]:
        """The first so many prompts in batches of equal size."""
        whole = range(0, max(self.batch, count - count % self.batch), self.batch)
        return [list(range(start, min(start + self.batch, len(self.calls)))) for start in whole]

    def measure(self, way: Way, count: int) -> Trial | None:
        """A way on the first so many prompts; None if its methods cannot act, never engage or keep too much."""
        key = f"{way.name} | {count}"
        if key not in self.known:
            found = self._measure(way, count)
            self.known[key] = [] if found is None else [found.speedup, found.distance, found.psnr]
        return Trial(way, *self.known[key]) if self.known[key] else None

    def time_again(self, trial: Trial, count: int, pairs: int) -> Trial:
        """A measured way with its speed taken from runs in turn with the plain one, and remembered so."""
        first = self.batches(1)[0]
        ratio = paired_ratio(lambda: self.draw(self.plain, first), lambda: self.draw(trial.way, first), pairs, 0)
        self.known[f"{trial.way.name} | {count}"][0] = ratio.median
        return replace(trial, speedup=ratio.median)

    def _measure(self, way: Way, count: int) -> Trial | None:
        plain, plain_seconds = self._plain(count), self._plain_seconds()
        kinds = ["latent", "np"] if self.with_pictures else ["latent"]
        distances, noise, times = [], [], []
        for index, batch in enumerate(self.batches(count)):
            drawn: list[Any] = []
            try:
                times.append(seconds(lambda batch=batch, drawn=drawn: drawn.append(self.draw(way, batch))))
                drawn += [self.draw(way, batch, kind) for kind in kinds[1:]]
            except (Refusal, NeverEngaged):
                return None
            distances += relative_distances(drawn[0].float(), plain[index][0].float())
            if self.with_pictures:
                noise.append(psnr(drawn[1], plain[index][1]))
        speed = plain_seconds / float(np.median(times))
        return Trial(way, speed, fmean(distances), fmean(noise) if noise else math.nan)

    def _plain(self, count: int) -> list[list[Any]]:
        """What the plain pipeline draws for each batch: latents, and pictures where they are wanted; drawn once."""
        if count not in self.results:
            kinds = ["latent", "np"] if self.with_pictures else ["latent"]
            self.results[count] = [
                [self.draw(self.plain, batch, kind) for kind in kinds] for batch in self.batches(count)
            ]
        return self.results[count]

    def _plain_seconds(self) -> float:
        """Of the plain pipeline on one batch, timed anew from time to time."""
        timed, value = self.clock
        if time.monotonic() - timed > STALE:
            value = seconds(lambda: self.draw(self.plain, self.batches(1)[0]))
            self.clock = (time.monotonic(), value)
        return value


def psnr(pictures: Any, plain: Any) -> float:
    """Peak signal-to-noise ratio in dB of arrays of pictures in [0, 1]."""
    error = float(np.square(np.asarray(pictures, np.float64) - np.asarray(plain, np.float64)).mean())
    return -10 * math.log10(error) if error else 100.0
