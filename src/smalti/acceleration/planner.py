"""Chooses methods for a stated target: so many times faster, as near to the plain run as possible; or near enough, as
fast as possible.

Ways to draw are measured on calibration prompts, in seconds and in distance to the plain run: what every method offers
for the target (`Method.candidates`), methods that compose, fewer steps, and both together. The best is then changed a
little at a time, as long as that helps and the time lasts: a full evaluation moves by one, a number up or down. Then
held-out prompts have the last word: there it is timed in turn with the plain run, beside plain ways of the same time.
A way that draws the very same as another is no other way, however its settings are written.

The distance is that of the final latents, ||x - plain|| / ||plain||, mean over prompts; PSNR is that of the pictures.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from smalti.acceleration.plan import Plan, model_of, scheduler_of
from smalti.core.cluster import run_all
from smalti.core.errors import UserError
from smalti.core.files import read_json, write_json
from smalti.core.method import CoreMethod
from smalti.evaluation.flops import count_flops
from smalti.evaluation.timing import paired_ratio
from smalti.evaluation.ways import Bench, Trial, Way
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.seams.find import methods as all_methods
from smalti.seams.find import words_of
from smalti.zoo.loader import settings_hash

FEW = 6
"""Prompts on which a way is tried first."""
FEW_STEPS = 8
SHARE = 0.2
"""Attention below this share of the FLOPs is not thinned out: it could not make the run much faster."""
MARGIN = 0.97
"""A way that is this near to the wanted speed may still reach it when it is changed a little."""
SLACK = 1.02
"""So much more than wanted is looked for: times and distances on other prompts differ a little."""
KEPT = 4
PAIRS = 5
SPEEDS = (1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
"""That are tried upwards where the distance is the target."""


@torch.no_grad()
def plan(
    pipe: Any,
    calls: Sequence[Mapping[str, Any] | str],
    speedup: float | None = None,
    psnr: float | None = None,
    *,
    steps: int = 28,
    batch: int = 1,
    held_out: int | None = None,
    max_memory: float | None = None,
    minutes: float = 10.0,
    keep: Path | str | None = None,
    progress: bool = False,
    cluster: str = "",
    workers: int = 2,
) -> Plan:
    """Finds the methods that meet one target on a pipeline.

    Args:
        pipe: a diffusers pipeline, ours or another.
        calls: prompts, or arguments of the pipeline's call with a `seed`; half of them are held out.
        speedup: times faster than the plain run that is wanted.
        psnr: PSNR to the plain run's pictures in dB that is wanted.
        steps: of the plain run.
        batch: prompts in a call.
        held_out: prompts of the verdict, the last ones; None = half of all.
        max_memory: GiB that methods may keep.
        minutes: of searching at most; the verdict comes on top.
        keep: json file in which measurements are kept, so that a search that was stopped goes on.
        progress: show a progress bar.
        cluster, workers: where ways are tried first, see `core.cluster.run_all`; what follows from these trials one by
            one, and the verdict, are measured here.

    Returns:
        The plan; where the target cannot be met, the best way that was found, with `is_met` False.

    Raises:
        UserError: not exactly one target, too few prompts, or an argument that the pipeline does not take.
    """
    if (speedup is None) == (psnr is None):
        raise UserError(f"got speedup={speedup}, psnr={psnr}; give one target")
    if speedup is not None and not speedup > 1:
        raise UserError(f"got a speedup of {speedup}; give a number above 1")
    every = [{"prompt": one} if isinstance(one, str) else dict(one) for one in calls]
    every = [{"seed": index, **one} for index, one in enumerate(every)]
    held_out = len(every) // 2 if held_out is None else held_out
    if not 0 < held_out < len(every) or min(held_out, len(every) - held_out) < 2 * batch:
        raise UserError(f"got {len(every)} prompts for calls of {batch}; give at least {4 * batch}, half is held out")
    pipe.set_progress_bar_config(disable=True)
    limit = None if max_memory is None else max_memory * 2**30
    way = Way(steps=steps)
    tried = Bench(
        pipe,
        every[:-held_out],
        way,
        batch,
        psnr is not None,
        limit,
        _known(keep, pipe, every[:-held_out], steps, batch),
    )
    search = Search(tried, time.monotonic() + 60 * minutes, keep, progress, cluster, workers)
    best = search.nearest(speedup) if speedup is not None else search.fastest(psnr)  # type: ignore[arg-type]
    search.bar.close()
    judged = Bench(pipe, every[-held_out:], way, batch, True, limit)
    result = _verdict(judged, best)
    wanted = {"speedup": speedup} if speedup is not None else {"psnr": psnr}
    [(name, value)] = wanted.items()
    is_met = getattr(result, name) >= value
    fair = max(1.0, min(result.speedup, speedup or math.inf))  # plain ways have as much time as ours, or more
    others = [one for one in (judged.measure(other, held_out) for other in plain_ways(pipe, way, fair)) if one]
    return Plan(
        model=model_of(pipe),
        steps=steps,
        drawn=best.way.steps,
        scheduler=scheduler_of(pipe),
        sample=tried.sample_shape(),
        way=best.way.name,
        methods=tuple(words_of(method) for method in best.way.methods),
        target={name: float(value)},  # type: ignore[arg-type]  # one of them is given
        is_met=is_met,
        measured={key: one for key, one in result.as_json().items() if key != "way"},
        front=tuple(one.as_json() for one in front_of(search.trials)),
        alternatives=tuple(one.as_json() for one in sorted(others, key=lambda one: one.distance)),
        notes=tuple(search.notes),
    )


class Search:
    """Measures ways until the time is over; remembers all of them."""

    def __init__(
        self,
        bench: Bench,
        deadline: float,
        keep: Path | str | None,
        progress: bool,
        cluster: str = "",
        workers: int = 2,
    ):
        self.bench, self.deadline, self.keep = bench, deadline, keep
        self.cluster, self.workers = cluster, workers
        self.trials: dict[str, Trial] = {}
        self.notes: list[str] = []
        self.few = min(FEW, len(bench.calls))
        self.bar = tqdm(desc="trying ways", unit="way", disable=not progress, leave=False)
        steps = bench.plain.steps
        flops = count_flops(lambda: bench.draw(bench.plain, bench.batches(1)[0]))
        self.attention = flops.attention / flops.total
        if steps <= FEW_STEPS:
            self.notes.append(f"{steps} steps are few: caches have nothing to reuse, expect no gain from them")
        if self.attention < SHARE:
            self.notes.append(f"attention is {self.attention:.0%} of the FLOPs: sparse attention was not tried")

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def look(self, way: Way, count: int) -> Trial | None:
        """Measures a way, and keeps what was measured."""
        if self.is_over and f"{way.name} | {count}" not in self.bench.known:
            return None
        trial = self.bench.measure(way, count)
        self.bar.update()
        if trial is not None:
            self.trials[f"{way.name} | {count}"] = trial
        if self.keep is not None:
            content = {"known": self.bench.known, "for": _fingerprint(self.bench)}
            write_json(Path(self.keep), content)
        return trial

    def timed_again(self, trial: Trial, count: int) -> Trial:
        """A trial whose speed was taken in turn with the plain run, if there is time left."""
        if self.is_over:
            return trial
        trial = self.bench.time_again(trial, count, PAIRS)
        self.trials[f"{trial.way.name} | {count}"] = trial
        return trial

    def look_all(self, ways: Iterable[Way]) -> list[Trial]:
        """Measures ways on the first prompts, each by a worker of the cluster if there is one."""
        ways = list(ways)
        if self.cluster:
            unknown = [way for way in dict.fromkeys(ways) if f"{way.name} | {self.few}" not in self.bench.known]
            bench, few, left = replace(self.bench, results={}), self.few, self.deadline - time.monotonic()
            for _, measured in run_all(lambda: _measurer(bench, few, left), unknown, self.cluster, self.workers):
                self.bench.known |= measured
        return [found for way in ways if (found := self.look(way, self.few)) is not None]

    def nearest(self, speedup: float) -> Trial:
        """The way of at least this speed that ends nearest to the plain run; of less speed, if none reaches it.

        Raises:
            UserError: there was no time to measure any.
        """
        wanted = speedup * SLACK
        found = self.screen(wanted)
        climbed = [self.climb(one, wanted) for one in found[:2]]
        count = len(self.bench.calls)
        whole = [one for one in (self.look(one.way, count) for one in dict.fromkeys((*climbed, *found))) if one]
        for one in _best(whole, wanted, KEPT):  # one timing is not enough to tell two near ways apart
            whole[whole.index(one)] = self.timed_again(one, count)
        ranked = _best(whole or climbed, wanted, 1)
        if not ranked:
            raise UserError("no way to draw could be measured in the time given; give more minutes")
        return ranked[0]

    def fastest(self, psnr: float) -> Trial:
        """The fastest way that is as near to the plain run as asked.

        Speeds are tried upwards without changing anything; then the last that was near enough, the first that was not,
        and one between them are tried in full, the fastest first.
        """
        psnr *= SLACK
        low, high = SPEEDS[0], SPEEDS[-1]
        for speedup in SPEEDS:
            best = self.screen(speedup)[:1]
            if not best or best[0].psnr < psnr:
                high = speedup
                break
            low = speedup
        for speedup in dict.fromkeys((high, (low + high) / 2, low)):
            if not self.is_over:
                self.nearest(speedup)
        whole = [one for name, one in self.trials.items() if name.endswith(f"| {len(self.bench.calls)}")]
        measured = whole or list(self.trials.values())
        if not measured:
            raise UserError("no way to draw could be measured in the time given; give more minutes")
        near = [one for one in measured if one.psnr >= psnr]
        return max(near, key=lambda one: one.speedup) if near else max(measured, key=lambda one: one.psnr)

    def screen(self, speedup: float) -> list[Trial]:
        """The best of all ways that are offered for a speed, on the first prompts, the best first."""
        found = self.look_all(self.ways(speedup))
        found += self.look_all(self.composed([one.way for one in _best(found, speedup, KEPT)], speedup))
        return _best(found, speedup, KEPT)

    def ways(self, speedup: float) -> Iterator[Way]:
        """Plain ways of this speed, and what every method offers, in turn, so that a short search has seen each."""
        plain = self.bench.plain
        yield from plain_ways(self.bench.pipe, plain, speedup)
        offers = []
        for kind in all_methods():
            if issubclass(kind, CoreMethod) and self.attention < SHARE:
                continue
            offers.append([replace(plain, methods=(one,)) for one in kind.candidates(plain.steps, speedup)])
        for index in range(max(map(len, offers), default=0)):
            yield from (some[index] for some in offers if index < len(some))

    def composed(self, ways: Sequence[Way], speedup: float) -> Iterator[Way]:
        """Good ways with fewer steps, and pairs of their methods."""
        plain = self.bench.plain
        for kind in dict.fromkeys(type(way.methods[0]) for way in ways if way.methods):
            for share in (0.75, 0.5):
                count = round(plain.steps * share)
                for method in kind.candidates(count, speedup * share)[:2] if speedup * share > 1 else ():
                    yield replace(plain, methods=(method,), steps=count)
        for one, other in combinations([way.methods[0] for way in ways if way.methods], 2):
            if not (one.refuses(other) or other.refuses(one)):
                yield replace(plain, methods=(one, other))

    def climb(self, start: Trial, speedup: float) -> Trial:
        """Changes a way a little as long as it gets nearer at this speed."""
        best, is_better = start, True
        while is_better and not self.is_over:
            is_better = False
            for way in neighbours(best.way):
                found = self.look(way, self.few)
                is_nearer = found is not None and found.distance < best.distance
                if found is not None and is_nearer and MARGIN * speedup <= found.speedup < speedup:
                    found = self.timed_again(found, self.few)  # a single timing is off by a few percent
                is_other = found is not None and found.distance != best.distance
                if found is not None and is_other and _rank(found, speedup) < _rank(best, speedup):
                    best, is_better = found, True
                    self.bar.set_postfix_str(f"{best.speedup:.2f} times faster, distance {best.distance:.4f}")
                    break
        return best


def _measurer(bench: Bench, count: int, left: float) -> Callable[[Way], dict[str, list[float]]]:
    """What a worker measures in the seconds that are left, by way and number of prompts."""
    deadline, bench = time.monotonic() + left, replace(bench, known={}, clock=(-math.inf, 0.0))

    @torch.no_grad()
    def work(way: Way) -> dict[str, list[float]]:
        bench.known.clear()
        if time.monotonic() < deadline:
            bench.measure(way, count)
        return dict(bench.known)

    return work


def plain_ways(pipe: Any, plain: Way, speedup: float) -> list[Way]:
    """Ways of about this speed without a method: fewer steps, for our own pipelines also another solver and guidance on
    a part of the interval."""
    counts = dict.fromkeys((max(1, math.floor(plain.steps / speedup)), math.ceil(plain.steps / speedup)))
    found = [replace(plain, steps=count) for count in counts]
    if isinstance(pipe, TextToImagePipeline):
        found += [replace(one, solver="dpm++") for one in found]
        for interval in ((0.0, 0.5), (0.5, 1.0), (0.25, 1.0)):
            share = 0.5 + 0.5 * (interval[1] - interval[0])
            found.append(replace(plain, steps=max(1, round(plain.steps / speedup / share)), interval=interval))
    return found


def neighbours(way: Way) -> Iterator[Way]:
    """Ways that differ in one number of one method: a whole one by 1, another by a quarter; of rising indices one moves
    by 1, comes in or goes."""
    for place, method in enumerate(way.methods):
        for one in fields(method):  # type: ignore[arg-type]  # methods are dataclasses
            for value in _steps_from(getattr(method, one.name), way.steps):
                try:
                    changed = replace(method, **{one.name: value})  # type: ignore[type-var]
                except UserError:
                    continue
                yield replace(way, methods=(*way.methods[:place], changed, *way.methods[place + 1 :]))


def _steps_from(value: Any, steps: int) -> Iterator[Any]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        yield from (value - 1, value + 1)
    elif isinstance(value, float) and value:
        yield from (value * 0.8, value * 1.25)
    elif isinstance(value, tuple) and len(value) > 3 and all(isinstance(one, int) for one in value):
        for index in range(1, len(value)):  # rising indices: the first stays
            for moved in (value[index] - 1, value[index] + 1):
                changed = (*value[:index], moved, *value[index + 1 :])
                if list(changed) == sorted(set(changed)) and moved < steps:
                    yield changed
        for index in range(1, len(value)):
            middle = (value[index - 1] + value[index]) // 2
            if middle > value[index - 1]:
                yield (*value[:index], middle, *value[index:])
            yield (*value[:index], *value[index + 1 :])


def front_of(trials: Mapping[str, Trial]) -> list[Trial]:
    """The trials that no other beats in speed and distance, the slowest first."""
    front: list[Trial] = []
    for one in sorted(trials.values(), key=lambda one: (-one.speedup, one.distance)):
        if not front or one.distance < front[-1].distance:
            front.append(one)
    return front[::-1]


def _rank(trial: Trial, speedup: float) -> tuple[float, float]:
    """Fast enough first, then near: what is too slow counts by how much."""
    return max(0.0, speedup - trial.speedup), trial.distance


def _best(trials: Sequence[Trial], speedup: float, count: int) -> list[Trial]:
    """The best so many: those fast enough by distance, or else those that come near to the speed."""
    ranked = sorted(trials, key=lambda one: _rank(one, speedup * (MARGIN if count > 1 else 1.0)))
    return ranked[:count]


def _verdict(bench: Bench, best: Trial) -> Trial:
    """The chosen way on held-out prompts, timed in turn with the plain one."""
    found = bench.measure(best.way, len(bench.calls))
    if found is None:
        raise UserError(f"{best.way.name} worked on the calibration prompts and not on the held-out ones")
    first = bench.batches(1)[0]
    ratio = paired_ratio(lambda: bench.draw(bench.plain, first), lambda: bench.draw(best.way, first), PAIRS, 1)
    return replace(found, speedup=ratio.median)


def _known(keep: Path | str | None, pipe: Any, calls: Sequence[Any], steps: int, batch: int) -> dict[str, list[float]]:
    """What an earlier search measured on the same pipeline, prompts and steps."""
    if keep is None or not Path(keep).is_file():
        return {}
    content = read_json(Path(keep))
    wanted = _fingerprint_of(pipe, calls, steps, batch)
    return content["known"] if isinstance(content, dict) and content.get("for") == wanted else {}


def _fingerprint(bench: Bench) -> str:
    return _fingerprint_of(bench.pipe, bench.calls, bench.plain.steps, bench.batch)


def _fingerprint_of(pipe: Any, calls: Sequence[Any], steps: int, batch: int) -> str:
    return settings_hash([model_of(pipe), scheduler_of(pipe), json.dumps(list(calls), default=str), steps, batch])
