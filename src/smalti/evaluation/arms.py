"""Arms: trainings that differ in one thing, from the same seeds, and their figures in pairs.

A page names its arms and has a function of module level that trains one of them; here every arm is run with every seed,
each in a process of its own on one thread, as many at once as there are cores. A finished arm is kept in a folder, so a
claim that was stopped goes on; it is trained anew as soon as its settings or anything the system rests on changes.
"""

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
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
    jobs = {_path(kept, arm, seed): (arm, seed) for seed in seeds for arm in arms}

    def report(path: Path, figures: Figures) -> None:
        arm, seed = jobs[path]
        say(f"{arm}, seed {seed}: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}")

    run_jobs(
        {path: partial(_train, slug, function, *job, dict(settings)) for path, job in jobs.items()},
        processes=processes,
        say=report,
    )
    return Arms({arm: [read_json(_path(kept, arm, seed)) for seed in seeds] for arm in arms}, tuple(seeds))


def run_jobs(
    jobs: Mapping[Path, Callable[[], Figures]],
    *,
    processes: int | None = None,
    deadline: float = math.inf,
    say: Callable[[Path, Figures], object] = lambda path, figures: None,
) -> bool:
    """Runs functions in processes of their own and keeps what each gives in its file; what is kept is not run again.

    Args:
        jobs: functions that a process can be given, by the json file of their figures.
        processes: how many run at once; None = one for each core.
        deadline: of `time.time()`, after which nothing is begun.
        say: told of every one that ends.

    Returns:
        Whether all files are there.
    """
    missing = [path for path in jobs if not path.is_file()]
    count = min(len(missing), processes or len(os.sched_getaffinity(0)))
    if count and time.time() < deadline:
        with ProcessPoolExecutor(count, get_context("spawn"), initializer=_begin) as pool:
            running = {pool.submit(_until, deadline, jobs[path]): path for path in missing}
            try:
                for done in as_completed(running):
                    path, figures = running[done], done.result()
                    if figures is not None:
                        write_json(path, figures)
                        say(path, figures)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # or the end of the block would wait for all that has not begun
                raise
    return all(path.is_file() for path in jobs)


def _until(deadline: float, job: Callable[[], Figures]) -> Figures | None:
    """Runs in a process of its own; None if it is too late to begin."""
    return job() if time.time() < deadline else None


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
