"""Arms: trainings that differ in one thing, from the same seeds, and their figures in pairs.

A page names its arms and has a function of module level that trains one of them; here every arm is run with every seed,
each in a process of its own on one thread, as many at once as there are cores. A finished arm is kept in a folder, so a
claim that was stopped goes on; it is trained anew as soon as its settings or anything the system rests on changes.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from smalti.core.catalogue import entry, fingerprint
from smalti.core.discovery import load_member
from smalti.core.files import read_json, write_json
from smalti.evaluation.paired import Comparison, compare

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Arms:
    """What all arms gave.

    Args:
        figures: for each arm one mapping a seed, from the name of a figure to its value.
        seeds: in the order of the figures.
    """

    figures: Mapping[str, Sequence[Figures]]
    seeds: tuple[int, ...]

    def values(self, arm: str, figure: str) -> list[float]:
        """One number a seed."""
        return [one[figure] for one in self.figures[arm]]

    def mean(self, arm: str, figure: str) -> float:
        """The mean over the seeds."""
        return fmean(self.values(arm, figure))

    def means(self, figure: str) -> dict[str, float]:
        """The mean over the seeds for each arm that has the figure."""
        return {arm: self.mean(arm, figure) for arm, some in self.figures.items() if figure in some[0]}

    def compare(self, ours: str, theirs: str, figure: str, factor: float = 1.0, below: bool = True) -> Comparison:
        """Whether one arm's figure lies below (or above) a factor of another's, paired by seed; at least 3 seeds."""
        return compare(self.values(ours, figure), self.values(theirs, figure), factor, below)


def run_arms(
    slug: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    function: str = "arm",
    processes: int | None = None,
    say: Callable[[str], None] = print,
) -> Arms:
    """Trains every arm with every seed.

    Args:
        slug: of the system whose page has `function(arm, seed, **settings) -> {figure: number}`.
        arms: their names.
        seeds: each is given to every arm.
        folder: where finished arms are kept.
        settings: further arguments, in json types.
        function: its name.
        processes: how many run at once; None = one for each core.
        say: told of every arm that ends.
    """
    kept = folder / _key(slug, function, settings)
    jobs = [(arm, seed) for seed in seeds for arm in arms]
    missing = [job for job in jobs if not _path(kept, *job).is_file()]
    count = min(len(missing), processes or len(os.sched_getaffinity(0)))
    if count:
        with ProcessPoolExecutor(count, get_context("spawn"), initializer=_begin) as pool:
            running = {pool.submit(_train, slug, function, *job, dict(settings)): job for job in missing}
            try:
                for done in as_completed(running):
                    arm, seed = running[done]
                    figures = done.result()
                    write_json(_path(kept, arm, seed), figures)
                    say(f"{arm}, seed {seed}: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}")
            except BaseException:
                pool.shutdown(cancel_futures=True)  # or the end of the block would wait for all that has not begun
                raise
    return Arms({arm: [read_json(_path(kept, arm, seed)) for seed in seeds] for arm in arms}, tuple(seeds))


def _begin() -> None:
    """At the start of a process: one thread, and an end as soon as the claim that started it is gone."""
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _train(slug: str, function: str, arm: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Runs in a process of its own."""
    page = load_member("systems", slug)
    return {name: float(value) for name, value in getattr(page, function)(arm, seed, **settings).items()}


def _key(slug: str, function: str, settings: Mapping[str, Any]) -> str:
    """Names a folder of results: the settings and hashes of everything that the system rests on."""
    content = json.dumps([function, settings, fingerprint(entry(slug))], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _path(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}-{seed}.json"
