"""Every training aid under one protocol: `smalti bench recipes --json`.

The same data, backbone, number of pictures and seeds; each aid alone, then those together that helped on emoji. Rate,
batch and EMA are tuned by as many trials for the plain training as for the aids together; each aid alone takes those of
the plain one, except that muP takes the best rate of a narrow model. Whether the aids reach the plain training's
distance in half of the pictures is judged on seeds that chose nothing. Trainings that ended are kept, so a run goes on.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from smalti.core.errors import UserError
from smalti.core.files import read_json
from smalti.evaluation.arms import run_jobs
from smalti.evaluation.digit_metrics import load_classifier
from smalti.evaluation.paired import compare
from smalti.recipes.aid_arm import QUARTERS, Setup, train_setup
from smalti.recipes.aid_data import DATA
from smalti.recipes.aids import AIDS, Aids
from smalti.zoo.loader import provenance, settings_hash

PLAIN, BEST, HALF = "plain", "together", "together, half of the pictures"
TRIAL_SEED, FRESH = 100, 10
"""Of trials; added to the seeds of the last comparison."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        data: the first one chooses.
        images: seen by each training.
        seeds: of each.
        rates, batches, emas: tried one after the other, the first of each being where the search starts.
        minutes: after which nothing new is begun.
        keep: folder of ended trainings.
    """

    data: tuple[str, ...] = ("emoji", "digits")
    images: int = 19200
    seeds: int = 3
    rates: tuple[float, ...] = (2e-3, 1e-3, 4e-3)
    batches: tuple[int, ...] = (32, 16, 64)
    emas: tuple[float, ...] = (0.99, 0.98, 0.995)
    minutes: float = 150.0
    keep: str = "out/recipes"


class LateError(Exception):
    """The minutes are used up."""


class Trainings:
    """Trainings by setup and seed, kept in files."""

    def __init__(self, settings: Settings):
        self.folder, self.deadline = Path(settings.keep), time.time() + 60 * settings.minutes
        self.bar = tqdm(desc="trainings", unit="run", disable=None)

    def of(self, setups: Sequence[Setup], seeds: Iterable[int]) -> list[list[dict[str, float]]]:
        """Figures of every setup, one a seed.

        Raises:
            LateError: they are not all known, and there is no time left.
        """
        seeds = list(seeds)
        paths = [[self.folder / f"{settings_hash(setup.as_json())}-{seed}.json" for seed in seeds] for setup in setups]
        jobs = {path: partial(train_setup, setup, seed) for setup, row in zip(setups, paths, strict=True)
                for path, seed in zip(row, seeds, strict=True)}  # fmt: skip
        if not run_jobs(jobs, deadline=self.deadline, say=lambda path, figures: self.bar.update()):
            raise LateError
        return [[read_json(path) for path in row] for row in paths]


def run(settings: Settings) -> dict[str, Any]:
    """The figures, with what they were measured on."""
    if unknown := [name for name in settings.data if name not in DATA]:
        raise UserError(f"there is no data set {unknown[0]!r} for aids; choose among {', '.join(DATA)}")
    prepare(settings)
    trainings, found = Trainings(settings), []
    result = {"benchmark": "recipes", "settings": asdict(settings), "data": found, "is_whole": True, **provenance()}
    chosen: Aids | None = None
    try:
        for name in settings.data:
            one: dict[str, Any] = {"data": name, "rows": []}
            found.append(one)
            chosen = _data(one, Setup(name, images=settings.images), chosen, settings, trainings)
    except LateError:
        result["is_whole"] = False
    trainings.bar.close()
    return result


def prepare(settings: Settings) -> None:
    """Makes what all trainings open: caches of latents and features, the classifier of digits."""
    for name in settings.data:
        data = DATA[name]()
        for aids in AIDS.values():
            if aids.teacher:
                data.features(aids.teacher)
    load_classifier()


def _data(one: dict[str, Any], base: Setup, chosen: Aids | None, settings: Settings, trainings: Trainings) -> Aids:
    """Fills in the rows of one data set; the aids that go together are chosen on the first."""
    seeds = range(settings.seeds)
    plain = _tuned(base, settings, trainings)
    narrow = replace(base, batch=plain.batch, ema=plain.ema)
    setups = {PLAIN: plain}
    for name, aids in AIDS.items():
        rate = plain.rate
        if aids.tuned_width:
            rate = _tuned(replace(narrow, width=aids.tuned_width), replace(settings, batches=(plain.batch,),
                          emas=(plain.ema,)), trainings).rate  # fmt: skip
        setups[name] = replace(plain, aids=aids, rate=rate)
    for name, figures in zip(setups, trainings.of(list(setups.values()), seeds), strict=True):
        one["rows"].append(_row(name, setups[name], figures))
    if chosen is None:
        chosen = together({row["name"]: row["mean"]["distance"] for row in one["rows"]})
    best = _tuned(replace(base, aids=chosen), settings, trainings)
    fresh = [seed + FRESH for seed in seeds]
    last = {PLAIN: plain, BEST: best, HALF: replace(best, images=best.images // 2)}
    figures = dict(zip(last, trainings.of(list(last.values()), fresh), strict=True))
    one["rows"] += [_row(name, last[name], figures[name]) for name in (BEST, HALF)]
    one["fresh"] = {name: [figure["distance"] for figure in some] for name, some in figures.items()}
    one["half"] = asdict(compare(one["fresh"][HALF], one["fresh"][PLAIN])) if settings.seeds > 2 else None
    return chosen


def together(at: dict[str, float]) -> Aids:
    """The aids whose distance is below the plain training's; of those that exclude each other, or say the same thing
    in two ways, the better."""
    chosen = Aids()
    for name in sorted((name for name in AIDS if at[name] < at[PLAIN]), key=lambda name: at[name]):
        if not chosen.said.keys() & AIDS[name].said.keys():
            with suppress(UserError):
                chosen |= AIDS[name]
    return chosen


def _tuned(setup: Setup, settings: Settings, trainings: Trainings) -> Setup:
    """The best rate, then the best batch with it, then the best EMA, by the distance of a seed used nowhere else."""
    start = {"rate": settings.rates[0], "batch": settings.batches[0], "ema": settings.emas[0]}
    best = replace(setup, **start)
    for name, values in (("rate", settings.rates), ("batch", settings.batches), ("ema", settings.emas)):
        tried = [replace(best, **{name: value}, is_trial=True) for value in values]
        figures = [some[0]["distance"] for some in trainings.of(tried, [TRIAL_SEED])]
        best = replace(tried[figures.index(min(figures))], is_trial=False)
    return best


def _row(name: str, setup: Setup, figures: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {
        "name": name, "setup": setup.as_json(), "figures": list(figures),
        "mean": {key: fmean(one[key] for one in figures) for key in figures[0]},
    }  # fmt: skip


def hours_to(row: dict[str, Any], distance: float) -> float | None:
    """Hours of training after which a row's mean distance was at most this one; None if it never was."""
    mean = row["mean"]
    for quarter in (*QUARTERS, 4):
        if mean["distance" if quarter == 4 else f"distance at {quarter}/4"] <= distance:
            return mean["seconds"] * quarter / 4 / 3600
    return None


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = []
    for one in result["data"]:
        lines.append(f"{one['data']}\n  distance   right   probe  images/s   hours to plain's  training")
        if not one["rows"]:
            continue
        goal = one["rows"][0]["mean"]["distance"]
        for row in one["rows"]:
            mean, hours = row["mean"], hours_to(row, goal)
            lines.append(
                f"  {mean['distance']:8.2f}  {mean['right']:6.3f}  {mean['probe']:6.3f}  "
                f"{mean['images per second']:8.0f}  {'never' if hours is None else f'{hours:.4f}':>17}  {row['name']}"
            )
        if one.get("half"):
            half = one["half"]
            ours, theirs = f"{half['ours']:.2f}", f"{half['theirs']:.2f}"
            lines.append(f"  half of the pictures, other seeds: {ours} against {theirs} of all, {half['outcome']}")
    if not result["is_whole"]:
        lines.append("the minutes ended before all was trained: the same command goes on")
    return "\n".join(lines)
