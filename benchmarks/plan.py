"""How good a plan is beside the cheap ways of the same time: `smalti bench plan --json`.

The planner has half of the held-out captions of a shipped model for its search and the other half for its verdict.
There stand beside it the plain ways of the same time or a little more: fewer steps with Euler and with DPM++ 2M, and
guidance on a part of the interval. Of each: distance of the final latents to the plain run and to a reference of many
steps, and the judge's score of its pictures, which are drawn from all held-out captions with seeds of their own. Ours
is no worse than another if the 95 % interval of their paired difference over captions does not lie wholly on the wrong
side.
"""

import time
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch

from smalti.acceleration.plan import Plan
from smalti.acceleration.planner import plain_ways, plan
from smalti.evaluation.paired import compare
from smalti.evaluation.rewards import JudgeReward
from smalti.evaluation.same_cost import relative_distances
from smalti.evaluation.ways import Bench, Way
from smalti.seams.find import make_method
from smalti.tasks.plan_pipeline import held_out_calls, open_pipeline
from smalti.zoo.loader import provenance

FIRST_SEED = 5000
MINUTES = 10
"""That search and verdict may take."""
GAIN = 0.2
"""How much smaller our distance is to be than the smallest of the others."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        model: a shipped model of pictures.
        steps: of the plain run; a plan for each.
        speedup: times faster.
        minutes: of searching at most; the verdict comes on top.
        batch: prompts in a call.
        count: captions, half of them for the verdict.
        reference: steps of the reference.
        judged: pictures of each way that the judge sees; all held-out captions if there are fewer.
    """

    model: str = "emoji"
    steps: tuple[int, ...] = (28, 50)
    speedup: float = 3.0
    minutes: float = 6.0
    batch: int = 8
    count: int = 64
    reference: int = 200
    judged: int = 400


@torch.no_grad()
def run(settings: Settings) -> dict[str, Any]:
    """The figures, with what they were measured on."""
    pipe = open_pipeline(settings.model, "cpu")
    calls = held_out_calls(settings.model, settings.count)
    judge = JudgeReward()
    plans = [_one(pipe, calls, steps, settings, judge) for steps in settings.steps]
    return {
        "benchmark": "plan", "model": settings.model, "settings": asdict(settings), "plans": plans, **provenance()
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = []
    for one in result["plans"]:
        lines.append(f"{one['steps']} steps, {one['speedup']:g} times faster, found in {one['minutes']:.1f} minutes")
        lines.append("  times faster  to plain  to reference  judge  way")
        for row in one["rows"]:
            figures = f"{row['speedup']:12.2f}  {row['distance']:8.4f}  {row['reference']:12.4f}  {row['judge']:5.3f}"
            lines.append(f"  {figures}  {row['way']}")
        lines += [
            f"  {'yes' if check['holds'] else 'NO ':3}  {check['name']}: {check['value']}" for check in one["checks"]
        ]
    return "\n".join(lines)


def _one(pipe: Any, calls: list[dict[str, Any]], steps: int, settings: Settings, judge: JudgeReward) -> dict[str, Any]:
    started = time.monotonic()
    found = plan(
        pipe, calls, settings.speedup, steps=steps, batch=settings.batch, minutes=settings.minutes, progress=True
    )
    minutes = (time.monotonic() - started) / 60
    plain = Way(steps=steps)
    bench = Bench(pipe, calls[len(calls) // 2 :], plain, settings.batch)
    captions = enumerate(held_out_calls(settings.model, settings.judged), FIRST_SEED)
    for_judge = Bench(pipe, [{**call, "seed": seed} for seed, call in captions], plain, settings.batch)
    prompts = [call["prompt"] for call in for_judge.calls]
    reference = _drawn(bench, Way(steps=settings.reference))
    rows = []
    for way, figures in _ways(pipe, found, plain):
        pixels = torch.from_numpy(_drawn(for_judge, way, "np")).permute(0, 3, 1, 2) * 2 - 1
        distances = relative_distances(torch.from_numpy(_drawn(bench, way)), torch.from_numpy(reference))
        scores = judge(pixels, prompts).tolist()
        rows.append({"way": way.name, **figures, "references": distances, "scores": scores})
    for row in rows:
        row |= {"reference": fmean(row["references"]), "judge": fmean(row["scores"])}
    checks = _checks(found, rows, minutes)
    rows = [{name: value for name, value in row.items() if name not in ("references", "scores")} for row in rows]
    return {
        "steps": steps, "speedup": settings.speedup, "minutes": minutes, "rows": rows, "checks": checks,
        "methods": list(found.methods), "notes": list(found.notes),
    }  # fmt: skip


def _ways(pipe: Any, found: Plan, plain: Way) -> list[tuple[Way, dict[str, float]]]:
    """The plain run, the plan, and what stands beside it, with the figures of the plan."""
    fair = max(1.0, min(found.measured["speedup"], found.target["speedup"]))
    by_name = {way.name: way for way in plain_ways(pipe, plain, fair)}
    ours = by_name.get(found.way) or Way(tuple(make_method(words) for words in found.methods), found.drawn)
    others = [(by_name[one["way"]], _figures(one)) for one in found.alternatives]
    return [(plain, {"speedup": 1.0, "distance": 0.0}), (ours, _figures(found.measured)), *others]


def _figures(measured: Any) -> dict[str, float]:
    return {"speedup": measured["speedup"], "distance": measured["distance"]}


def _drawn(bench: Bench, way: Way, kind: str = "latent") -> np.ndarray:
    """Latents or pictures of all prompts."""
    starts = range(0, len(bench.calls), bench.batch)
    parts = [range(start, min(start + bench.batch, len(bench.calls))) for start in starts]
    return np.concatenate([np.asarray(bench.draw(way, part, kind), np.float32) for part in parts])


def _checks(found: Plan, rows: list[dict], minutes: float) -> list[dict[str, Any]]:
    plain, ours, *others = rows
    nearest = min(others, key=lambda row: row["distance"])
    return [
        {"name": "times faster", "value": round(ours["speedup"], 2), "holds": found.is_met},
        {
            "name": f"distance to plain over the best other's ({nearest['way']})",
            "value": round(ours["distance"] / nearest["distance"], 3),
            "holds": ours["distance"] <= (1 - GAIN) * nearest["distance"],
        },
        {
            "name": "distance to the reference no larger than any other's",
            "value": [round(one["reference"], 4) for one in (ours, *others)],
            "holds": all(not is_worse(ours["references"], one["references"], below=True) for one in others),
        },
        {
            "name": "judge's score no smaller than any other's",
            "value": [round(one["judge"], 4) for one in (ours, *others)],
            "holds": all(not is_worse(ours["scores"], one["scores"], below=False) for one in others),
        },
        {
            "name": "judge's score no smaller than the plain run's",
            "value": [round(one["judge"], 4) for one in (ours, plain)],
            "holds": not is_worse(ours["scores"], plain["scores"], below=False),
        },
        {"name": "minutes of search and verdict", "value": round(minutes, 1), "holds": minutes <= MINUTES},
    ]


def is_worse(ours: list[float], theirs: list[float], below: bool) -> bool:
    """Whether the 95 % interval of the paired difference lies wholly on the wrong side."""
    found = compare(ours, theirs, below=below)
    return found.low > 0 if below else found.high < 0
