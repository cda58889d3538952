"""Every method that makes a pipeline faster, on every model that ships: `smalti bench accelerators --json`.

Of each method the settings that it offers for a wanted speed, beside the plain ways of that speed: times faster than
the plain run, distance of the final latents to it, PSNR of the pictures, FLOPs and memory that a method keeps for one.
Then from how many tokens on a method is faster at all, on a random model of `emoji`'s size. Methods are found, not
listed.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from smalti.acceleration.planner import plain_ways
from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.core.files import read_json, write_json
from smalti.core.method import Method
from smalti.evaluation.flops import count_flops
from smalti.evaluation.full_size import flux_dev
from smalti.evaluation.full_size_video import full_size_run
from smalti.evaluation.timing import paired_ratio
from smalti.evaluation.token_skipping import skipping_ratio
from smalti.evaluation.ways import Bench, Way
from smalti.seams.apply import apply
from smalti.seams.find import methods, words_of
from smalti.tasks.plan_pipeline import held_out_calls, open_pipeline
from smalti.zoo.loader import provenance, settings_hash

BATCH = 8
RANDOM_STEPS = 12
REPEATS = 3
FULL_STEPS = 28
FULL = (
    ("flux-dev", (1, 1024, 1024)), ("flux-dev", (1, 2048, 2048)), ("flux-dev", (1, 4096, 4096)),
    ("wan-14b", (81, 480, 832)), ("ltx-2b", (161, 512, 768)), ("pixart-sigma", (1, 1024, 1024)),
)  # fmt: skip
"""Published shapes, with frames, height and width in pixels."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        models: that ship.
        steps: of the plain runs of each.
        speedups: that settings are asked for.
        offers: settings of a method that are taken for each speed, at most.
        count: prompts.
        sides: of the square grids of tokens on which a method is timed on a random model.
        minutes: after which nothing new is begun; what was measured is kept and not measured again.
        keep: json file of what was measured.
        full: on a GPU, published shapes with random weights instead: seconds alone.
    """

    models: tuple[str, ...] = ("emoji", "emoji-1k", "clip")
    steps: tuple[int, ...] = (28,)
    speedups: tuple[float, ...] = (1.5, 2.0, 3.0)
    offers: int = 3
    count: int = 8
    sides: tuple[int, ...] = (16, 32)
    minutes: float = 30.0
    keep: str = "out/accelerators.kept.json"
    full: bool = False


class Kept:
    """Measured figures by key, in a file, and the time that is left."""

    def __init__(self, settings: Settings):
        self.file, self.deadline = Path(settings.keep), time.monotonic() + 60 * settings.minutes
        where = settings_hash([settings.count, provenance()["hardware"]])
        content = read_json(self.file) if self.file.is_file() else {}
        self.known: dict[str, Any] = content["known"] if content.get("for") == where else {}
        self.where = where
        self.bar = tqdm(desc="measuring", unit="way", disable=None)

    def of(self, key: list[Any], measure: Callable[[], Any]) -> Any:
        """What is known of a key, or is measured now; None if there is no time left."""
        name = json.dumps(key)
        if name not in self.known:
            if time.monotonic() > self.deadline:
                return None
            self.known[name] = measure()
            write_json(self.file, {"for": self.where, "known": self.known})
        self.bar.update()
        return self.known[name]


@torch.no_grad()
def run(settings: Settings) -> dict[str, Any]:
    """The figures, with what they were measured on."""
    if settings.full and not torch.cuda.is_available():
        raise UserError("published shapes are timed on a GPU, and there is none; leave full out")
    kept = Kept(settings)
    if settings.full:
        full = _full(kept, torch.device("cuda"))
        kept.bar.close()
        return {
            "benchmark": "accelerators", "settings": asdict(settings), "full": full, "models": [], "tokens": [],
            **provenance(),
        }  # fmt: skip
    kinds = [kind for kind in methods() if kind.work == "less"]
    tokens = [_tokens(kind, settings, kept) for kind in kinds]
    found = [_model(name, steps, kinds, settings, kept) for name in settings.models for steps in settings.steps]
    kept.bar.close()
    return {
        "benchmark": "accelerators",
        "settings": asdict(settings),
        "models": found,
        "tokens": [one for one in tokens if one["ratios"]],
        "is_whole": time.monotonic() < kept.deadline,
        **provenance(),
    }


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = []
    for one in result["models"]:
        lines.append(f"{one['model']}, {one['steps']} steps, attention {one['attention']:.0%} of the FLOPs")
        lines.append("  times faster  distance   PSNR  FLOPs  kept MiB  way")
        for row in sorted(one["rows"], key=lambda row: -row["speedup"]):
            figures = f"{row['speedup']:12.2f}  {row['distance']:8.4f}  {row['psnr']:5.1f}  {row['flops']:5.2f}"
            lines.append(f"  {figures}  {row['kept'] / 2**20:8.2f}  {row['way']}")
    for one in result.get("full", []):
        median, low, high, seconds = one["ratio"]
        name = f"{one['model']} {one['size']}, dense {seconds:.2f} s"
        lines.append(f"  {median:6.2f} [{low:.2f}, {high:.2f}] times faster  {name}  {one['method']}")
    lines.append("plain over ours in seconds on a random model, by tokens")
    for one in result["tokens"]:
        ratios = ", ".join(f"{count}: {ratio[0]:.2f}" for count, ratio in one["ratios"].items())
        lines.append(f"  {one['method']}  {ratios}; {faster_from(one['ratios'])}")
    return "\n".join(lines)


def faster_from(ratios: dict[str, list[float]]) -> str:
    """From how many tokens on a method is faster with its whole interval, at all larger numbers too."""
    first = None
    for count, (_, low, _) in sorted(ratios.items(), key=lambda item: -int(item[0])):
        if low <= 1:
            break
        first = count
    return f"not faster up to {max(map(int, ratios))} tokens" if first is None else f"faster from {first} tokens on"


def _model(name: str, steps: int, kinds: list[type[Method]], settings: Settings, kept: Kept) -> dict[str, Any]:
    pipe = open_pipeline(name, "cpu")
    pipe.set_progress_bar_config(disable=True)
    plain = Way(steps=steps)
    bench = Bench(pipe, held_out_calls(name, settings.count), plain, min(BATCH, settings.count), with_pictures=True)
    flops = kept.of([name, steps, "plain"], lambda: _plain(bench))
    rows = []
    for method, way in _ways(pipe, plain, kinds, settings):
        figures = kept.of([name, steps, way.name], lambda way=way: _figures(bench, way, flops["total"]))
        if figures:
            rows.append({"method": method, "way": way.name, **figures})
    share = flops["attention"] / flops["total"] if flops else 0.0
    return {"model": name, "steps": steps, "attention": share, "rows": rows}


def _ways(pipe: Any, plain: Way, kinds: list[type[Method]], settings: Settings) -> Iterator[tuple[str, Way]]:
    """Plain ways and what methods offer, with the method's name."""
    seen = set()
    for speedup in settings.speedups:
        offers = [("plain", way) for way in plain_ways(pipe, plain, speedup)]
        for kind in kinds:
            offered = kind.candidates(plain.steps, speedup)[: settings.offers]
            offers += [(kind.__name__, Way((method,), plain.steps)) for method in offered]
        for name, way in offers:
            if way not in seen:
                seen.add(way)
                yield name, way


def _plain(bench: Bench) -> dict[str, float]:
    counted = count_flops(lambda: bench.draw(bench.plain, [0]))
    return {"total": counted.total, "attention": counted.attention}


def _figures(bench: Bench, way: Way, flops: float) -> dict[str, float]:
    """Figures of a way; empty if its methods cannot act on this model."""
    trial = bench.measure(way, len(bench.calls))
    if trial is None:
        return {}
    memory = 0
    with ExitStack() as stack:
        handle = stack.enter_context(apply(bench.pipe, *way.methods)) if way.methods else None
        counted = count_flops(lambda: bench.draw(replace(way, methods=()), [0])).total
        if handle is not None:
            memory = sum(one.kept for one in handle.report().methods)
    return {
        "speedup": trial.speedup, "distance": trial.distance, "psnr": trial.psnr,
        "flops": flops / counted, "kept": memory,
    }  # fmt: skip


def _tokens(kind: type[Method], settings: Settings, kept: Kept) -> dict[str, Any]:
    """Plain over ours in seconds by number of tokens, where the method acts on a random model."""
    method = (*kind.candidates(RANDOM_STEPS, 2.0), kind())[0]
    ratios = {}
    for side in settings.sides:
        found = kept.of(["tokens", words_of(method), side], lambda side=side: _ratio(method, side))
        if found:
            ratios[str(side**2)] = found
    return {"method": words_of(method), "ratios": ratios}


def _ratio(method: Method, side: int) -> list[float]:
    try:
        found = skipping_ratio(method, side, RANDOM_STEPS, REPEATS)
    except (Refusal, NeverEngaged, UserError):
        return []
    return [found.median, found.low, found.high]


def _full(kept: Kept, device: torch.device) -> list[dict[str, Any]]:
    """Methods on published shapes with random weights: seconds of the dense run, compiled on a GPU, over ours."""
    found = []
    for name, size in FULL:
        kinds = [kind for kind in methods() if kind.work == "less" and kind.candidates(FULL_STEPS, 2.0)]
        if name == "flux-dev":
            model, run = flux_dev(device, size[1], FULL_STEPS)
        else:
            model, run = full_size_run(name, size, FULL_STEPS, device)
        for kind in kinds:
            method = kind.candidates(FULL_STEPS, 2.0)[0]
            key = ["full", name, list(size), words_of(method)]
            ratio = kept.of(key, lambda method=method, model=model, run=run: _full_ratio(method, model, run))
            if ratio:
                found.append({"model": name, "size": list(size), "method": words_of(method), "ratio": ratio})
        del model, run
        torch.cuda.empty_cache()
    return found


def _full_ratio(method: Method, model: Any, run: Callable[[], Any]) -> list[float]:
    def ours() -> Any:
        with apply(model, method):
            return run()

    try:
        found = paired_ratio(run, ours, repeats=4, warmup=1)
    except (Refusal, NeverEngaged, UserError):
        return []
    return [found.median, found.low, found.high, found.first]
