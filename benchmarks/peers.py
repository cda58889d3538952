"""TaylorSeer beside diffusers' cache, cache-dit and fewer steps, in one process at one schedule of full evaluations.

    smalti bench peers --json

On random weights of Flux, Wan and DiT it gives FLOPs, memory and seconds; how far a forecast ends from the plain run
says nothing there. That distance is measured on `emoji`, whose weights are carried over into diffusers' Flux class so
that every peer can be attached. Each runs on a twin of the model over the same weights. Nothing data-dependent decides,
so all have the same number of full evaluations.

Accepted is: on Flux and Wan ours has no more FLOPs than the peer with the fewest, and holds no more memory than that
peer in the same form ("full": a series for every sublayer; "lite": one for the output). Seconds are not judged.
"""

import importlib.metadata
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.errors import UserError, unknown_name
from smalti.evaluation.flops import count_flops
from smalti.evaluation.peer_hosts import EMOJI, LARGE, NAMES, SMALL, Host, emoji_host, random_host
from smalti.evaluation.peers import (
    Attached,
    NotInstalled,
    Schedule,
    Watch,
    cache_dit_taylorseer,
    diffusers_taylorseer,
    held_bytes,
    twin,
)
from smalti.evaluation.same_cost import Measured, steps_of_equal_cost
from smalti.evaluation.timing import paired_ratio
from smalti.seams.apply import apply
from smalti.zoo.loader import provenance

JUDGED = ("flux", "wan")
PACKAGES = ("diffusers", "cache-dit")
WARMUP = {"cpu": 0, "cuda": 3}
"""Untimed pairs; on the CPU the runs that were counted are enough."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        models: flux, wan, dit (random weights) and emoji.
        steps: Euler steps of a run.
        warmup: full evaluations at its beginning.
        interval: after them one in so many is full.
        repeats: timed pairs of each with the plain run; 10 on a GPU.
        prompts: held-out prompts of `emoji`, for the distance.
        device: cpu, or cuda for the shapes of FLUX.1-dev, Wan2.1 14B and DiT-XL/2 in bfloat16.
        threads: of the CPU.
    """

    models: tuple[str, ...] = NAMES
    steps: int = 28
    warmup: int = 3
    interval: int = 5
    repeats: int = 3
    prompts: int = 16
    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True)
class Contestant:
    """One way to the end.

    Args:
        name: of its row.
        owner: smalti, a package of `PACKAGES`, or "" for the plain model.
        form: plain, steps, full (a series for every sublayer), lite (one for the output) or blocks (cache-dit's).
        order: highest derivative.
        attach: to a twin of the model.
    """

    name: str
    owner: str
    form: str
    order: int
    attach: Callable[[nn.Module, Schedule], Attached]


class Counted(NamedTuple):
    """One run: final latents (B, ...), FLOPs, bytes that caches hold at its end, peak bytes of a GPU."""

    latents: Tensor
    flops: float
    held: int
    peak: int | None


def _plain(model: nn.Module, schedule: Schedule) -> Attached:
    return Attached(model, nullcontext, tuple)


def _ours(model: nn.Module, schedule: Schedule, order: int, lite: bool) -> Attached:
    handle = apply(model, TaylorSeer(schedule.interval, order, schedule.warmup, lite=lite))
    return Attached(model, lambda: handle.run(schedule.steps), lambda: handle)


PLAIN = Contestant("plain", "", "plain", 0, _plain)
CONTESTANTS = (
    Contestant("ours, order 1", "smalti", "full", 1, partial(_ours, order=1, lite=False)),
    Contestant("ours, order 2", "smalti", "full", 2, partial(_ours, order=2, lite=False)),
    Contestant("ours, lite", "smalti", "lite", 1, partial(_ours, order=1, lite=True)),
    Contestant("diffusers, order 1", "diffusers", "full", 1, partial(diffusers_taylorseer, order=1)),
    Contestant("diffusers, order 2", "diffusers", "full", 2, partial(diffusers_taylorseer, order=2)),
    Contestant("diffusers, lite", "diffusers", "lite", 1, partial(diffusers_taylorseer, order=1, is_lite=True)),
    Contestant("diffusers, our steps", "diffusers", "full", 1, partial(diffusers_taylorseer, is_replayed=True)),
    Contestant("cache-dit, order 1", "cache-dit", "blocks", 1, partial(cache_dit_taylorseer, order=1)),
)


def run(settings: Settings) -> dict[str, Any]:
    """All models in turn; `acceptance` of the result holds what was judged.

    Raises:
        UserError: an unknown model or device, or a schedule without a forecast.
    """
    for name in settings.models:
        if name not in NAMES:
            raise unknown_name("model", name, NAMES)
    if settings.device not in WARMUP:
        raise unknown_name("device", settings.device, WARMUP)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("got device cuda, but torch sees no CUDA device; use device=cpu")
    schedule = Schedule(settings.steps, settings.warmup, settings.interval)
    if not 0 < sum(schedule.mask) < settings.steps:
        raise UserError(f"no evaluation of {schedule} is a forecast; take more steps, or a shorter warm-up")
    torch.set_num_threads(settings.threads)
    models = {name: _measure(_host(name, settings), schedule, settings.repeats) for name in settings.models}
    return {
        "benchmark": "peers",
        "settings": asdict(settings),
        "models": models,
        "acceptance": [one for name in JUDGED if name in models for one in judge(name, models[name]["rows"])],
        "packages": {name: _version(name) for name in PACKAGES},
        **provenance(),
    }


def table(result: dict[str, Any]) -> str:
    """The rows of every model, and what was judged."""
    lines = []
    for name, model in result["models"].items():
        lines.append(f"{name}: {model['class']}, {model['parameters'] / 1e6:.1f} M parameters; {model['about']}")
        lines.append(f"  {'':21}{'full':>5}{'GFLOP':>18}{'caches':>13}{'seconds':>9}  {'plain / this':22}distance")
        plain = model["rows"][0]
        lines += [f"  {row['name']:21}{row['reason'] or _figures(row, plain)}".rstrip() for row in model["rows"]]
        lines.append("")
    for one in result["acceptance"]:
        lines.append(
            f"{one['model']}, {one['ours']}: {'accepted' if one['accepted'] else 'NOT accepted'}, {one['why']}"
        )
    return "\n".join(lines)


def judge(model: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each form of ours against the peer with the fewest FLOPs among those of its form and order (cache-dit, whose form
    none of ours has, competes with "full" in FLOPs alone)."""
    verdicts = []
    for ours in (row for row in rows if row["owner"] == "smalti"):
        forms = {"full": ("full", "blocks"), "lite": ("lite",)}[ours["form"]]
        rivals = [
            row
            for row in rows
            if row["owner"] in PACKAGES and row["form"] in forms and row["order"] == ours["order"]
            if row["reason"] is None and ours["reason"] is None and row["full"] == ours["full"]
        ]
        verdict = {
            "model": model,
            "ours": ours["name"],
            "peer": None,
            "accepted": False,
            "why": "no peer to compare with",
        }
        if rivals:
            peer = min(rivals, key=lambda row: row["flops"])
            verdict["peer"] = peer["name"]
            verdict["accepted"] = ours["flops"] <= peer["flops"]
            verdict["why"] = f"{ours['flops'] / 1e9:.6g} GFLOP, {peer['name']} {peer['flops'] / 1e9:.6g}"
            if peer["form"] == ours["form"]:
                verdict["accepted"] &= ours["held_bytes"] <= peer["held_bytes"]
                verdict["why"] += f"; {ours['held_bytes']} bytes held, {peer['held_bytes']}"
        verdicts.append(verdict)
    return verdicts


def _host(name: str, settings: Settings) -> Host:
    device = torch.device(settings.device)
    if name == EMOJI:
        return emoji_host(settings.prompts, device, settings.steps)
    if settings.device == "cuda":
        return random_host(name, LARGE[name], device, torch.bfloat16)
    return random_host(name, SMALL[name], device, torch.float32)


def _measure(host: Host, schedule: Schedule, repeats: int) -> dict[str, Any]:
    """Every contestant on one model, and as many plain steps as the caches cost."""
    with tqdm(total=len(CONTESTANTS) + 1, desc=host.name, unit="row", file=sys.stderr, leave=False) as bar:
        plain, counted = _row(host, PLAIN, schedule)
        assert counted is not None, f"the plain {host.name} does not run: {plain['reason']}"
        full = Measured(counted.latents, counted.flops, 0.0)
        rows, costs = [], set()
        for one in CONTESTANTS:
            bar.update()
            row, counted = _row(host, one, schedule, full, repeats)
            rows.append(row)
            if counted is not None:
                costs.add(steps_of_equal_cost(full, schedule.steps, Measured(counted.latents, counted.flops, 0.0)))
        for steps in sorted(costs):
            fewer = replace(PLAIN, name=f"{steps} steps", form="steps")
            rows.append(_row(host, fewer, replace(schedule, steps=steps), full, repeats, schedule.steps)[0])
        bar.update()
    plain["seconds"] = median(row["ratio"]["first"] for row in rows if row["ratio"] is not None)
    return {
        "about": "emoji's weights in diffusers' Flux" if host.is_trained else "random weights: FLOPs, memory and time",
        "class": type(host.model).__name__,
        "parameters": sum(one.numel() for one in host.model.parameters()),
        "dtype": str(next(host.model.parameters()).dtype).removeprefix("torch."),
        "latents": list(host.noise.shape),
        "timed_samples": host.timed,
        "rows": [plain, *rows],
    }


def _row(
    host: Host,
    one: Contestant,
    schedule: Schedule,
    full: Measured | None = None,
    repeats: int = 0,
    plain_steps: int | None = None,
) -> tuple[dict[str, Any], Counted | None]:
    """One contestant's figures; where a peer cannot run, the reason instead."""
    row: dict[str, Any] = {"name": one.name, "owner": one.owner, "form": one.form, "order": one.order}
    row |= {"reason": None, "seconds": None, "ratio": None, "distance": None}
    model = twin(host.model)
    watch = Watch(model)
    try:
        attached = one.attach(model, schedule)
        counted = _count(host, attached, watch, schedule.steps)
        row["ratio"] = None if full is None else _time(host, attached, schedule.steps, plain_steps, repeats)
    except torch.cuda.OutOfMemoryError:
        return {**row, "reason": "out of memory"}, None
    except NotInstalled as error:
        return {**row, "reason": str(error)}, None
    except Exception as error:  # whatever a peer raises is its answer
        if one.owner not in PACKAGES:
            raise
        text = " ".join(str(error).split())[:200]
        return {**row, "reason": f"cannot attach: {type(error).__name__}: {text}"}, None
    row |= {"flops": counted.flops, "full": sum(watch.full), "partial": watch.full.count(0)}
    row |= {"schedule": "".join(map(str, watch.full)), "held_bytes": counted.held, "peak_bytes": counted.peak}
    if full is not None:
        row["seconds"] = row["ratio"]["second"]
        if host.is_trained:
            distances = Measured(counted.latents, counted.flops, 0.0).distances(full)
            row["distance"] = sum(distances) / len(distances)
    return row, counted


def _count(host: Host, attached: Attached, watch: Watch, steps: int) -> Counted:
    weights = [*host.model.parameters(), *host.model.buffers()]
    latents, held = host.noise, 0

    def draw() -> None:
        nonlocal latents, held
        with attached.run():
            latents = host.draw(watch.around(attached.model), steps)
            held = held_bytes(attached.state(), (weights, watch.inputs))
            watch.end()

    is_cuda = host.noise.is_cuda
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    flops = count_flops(draw).total
    return Counted(latents, flops, held, torch.cuda.max_memory_allocated() if is_cuda else None)


def _time(host: Host, attached: Attached, steps: int, plain_steps: int | None, repeats: int) -> dict[str, Any]:
    """Seconds of the plain run (first) over those of this one (second), in turn."""
    few = host.first(host.timed)

    def draw() -> None:
        with attached.run():
            few.draw(attached.model, steps)

    warmup = WARMUP[host.noise.device.type]
    return asdict(paired_ratio(lambda: few.draw(host.model, plain_steps or steps), draw, repeats, warmup))


def _figures(row: dict[str, Any], plain: dict[str, Any]) -> str:
    flops = f"{row['flops'] / 1e9:.5g} ({plain['flops'] / row['flops']:.2f}x)"
    ratio = row["ratio"]
    speed = "" if ratio is None else f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    distance = "" if row["distance"] is None else f"{row['distance']:.4f}"
    held = row["held_bytes"] / 2**20
    return f"{row['full']:5}{flops:>18}{held:9.3f} MiB{row['seconds']:9.3f}  {speed:22}{distance}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
