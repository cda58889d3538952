"""Confidence-gated Taylor runs the first block of a transformer to learn whether the others need to run.

Hidden states move smoothly along a run, and a Taylor series from the last full steps forecasts them. Where the forecast
of the first block agrees with the block itself, that of the last block is taken and all between are skipped. The claim:
with as many full steps, placed by the gate, it ends closer to the full run than forecasts at fixed intervals.
"""

import math
from contextlib import nullcontext
from functools import partial

import torch

from smalti.acceleration.confidence_gated_taylor import ConfidenceGatedTaylor
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.protocols import Latents
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.calibration import accelerated, find_threshold
from smalti.evaluation.flops import count_flops
from smalti.evaluation.foregone import Foregone, rank_correlation
from smalti.evaluation.full_size import SUSTAINED, flux_dev
from smalti.evaluation.held_out_prompts import Prompts, draw_latents, held_out_prompts
from smalti.evaluation.paired import compare
from smalti.evaluation.same_cost import relative_distances
from smalti.evaluation.timing import paired_ratio
from smalti.seams.apply import apply

SYSTEM = System(
    slug="confidence-gated-taylor",
    uses=(
        "acceleration.confidence_gated_taylor.ConfidenceGatedTaylor", "acceleration.taylorseer.TaylorSeer",
        "ops.taylor.TaylorState", "evaluation.calibration.find_threshold",
    ),
    models=("emoji",),
    data=("emoji",),
)  # fmt: skip
STEPS, PROMPTS, CHOSEN, INTERVAL, WARMUP = 50, 64, 16, 3, 3
EVERY_THIRD = tuple(step for step in range(WARMUP, STEPS) if (step - WARMUP + 1) % INTERVAL)
"""What TaylorSeer forecasts at this interval: 32 of 50 steps; 18 are full."""
BETWEEN = (0.01, 0.4)
"""Where thresholds are looked for."""
STATED = 35.0
"""PSNR to the full run in dB that is asked for."""


def gate(tau: float, forced: tuple[int, ...] = ()) -> ConfidenceGatedTaylor:
    """Orders as chosen on other concepts."""
    return ConfidenceGatedTaylor(tau, order=2, probe_order=1, warmup=WARMUP, forced=forced)


def first_block_cache(tau: float) -> ConfidenceGatedTaylor:
    """Repeats where the gate forecasts, target and probe."""
    return ConfidenceGatedTaylor(tau, order=0, probe_order=0, warmup=WARMUP)


def small(ctx) -> Verdict:
    """`emoji`, 50 steps, 18 of them full, every prompt by itself: distance of the final latents to the full run."""
    pipe, prompts = ctx.model("emoji"), held_out_prompts("emoji", PROMPTS)
    draws, find = one_by_one(pipe, prompts), searcher(ctx, pipe, prompts)
    ctx.say(f"full run of {STEPS} steps on {PROMPTS} prompts")
    full = draw_latents(pipe, prompts, STEPS)

    def gated(method, count=PROMPTS):
        ctx.say(str(method))
        return accelerated(pipe, method, draws[:count], full.split(1)[:count])

    def fixed(method=None, steps=STEPS):
        ctx.say(f"{steps} steps, {method or 'all full'}")
        with nullcontext() if method is None else apply(pipe, method):
            return relative_distances(draw_latents(pipe, prompts, steps), full)

    share = len(EVERY_THIRD) / STEPS
    tau = find(gate, "skip", 1.01 * share, 0.01)
    ours, reuse = gated(gate(tau)), gated(first_block_cache(find(first_block_cache, "skip", share, 0.01)))
    careful = gate(find(gate, "psnr", STATED, 0.01))
    stated = accelerated(pipe, careful, decoded(pipe, draws), pictures(pipe, full).split(1)).mean("psnr")
    rivals = {f"Lite TaylorSeer, order {order}": TaylorSeer(INTERVAL, order, lite=True) for order in (1, 2, 3)}
    rivals |= {f"no gate, order {order}": ConfidenceGatedTaylor(order=order, forced=EVERY_THIRD) for order in (1, 2)}
    others = {name: fixed(method) for name, method in rivals.items()}
    best = min(others, key=lambda name: sum(others[name]))
    main = compare(ours.distances, others[best])
    cost = flops_of(pipe, draws[:2], gate(tau)) / flops_of(pipe, draws[:2], gate(0))
    fewer = compare(ours.distances, fixed(steps=math.ceil(STEPS * cost)))
    cache, module = compare(ours.distances, reuse.distances), compare(ours.distances, fixed(TaylorSeer(INTERVAL, 1)))
    blind, found = gated(gate(1e9), 8).mean("distance"), premise(ctx, pipe, draws[:8])
    kept = bytes_kept(pipe, draws[0], gate(tau)) / bytes_kept(pipe, draws[0], TaylorSeer(INTERVAL, 1))
    with apply(pipe, gate(0)):
        exact = draws[0]()
    steps, is_same = STEPS * (1 - ours.skipped), torch.equal(exact, draws[0]())
    return Verdict(
        measured=f"relative L2 distance of final latents to the full run, {STEPS} steps of which 18 are full",
        unit="relative L2",
        ours=main.ours,
        comparators={name: sum(distances) / PROMPTS for name, distances in others.items()},
        rule="ours < the best of Lite TaylorSeer and forecasts without a gate, every third step full",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=prompts.seeds,
        checks=(
            compare(ours.distances, others["Lite TaylorSeer, order 1"], 0.9).check(
                "against Lite TaylorSeer, order 1", "< 0.9 * Lite TaylorSeer, order 1"
            ),
            Check("full steps of ours, mean", steps, "<= 18", steps <= 18),
            Check("rank correlation of probe and last block, over steps", found["all"], "> 0.5", found["all"] > 0.5),
            Check("the same among steps equally far from the last full one", found["equal gaps"]),
            cache.check("against First-Block-Cache, as many full steps", f"< {cache.theirs:.4f}"),
            module.check("against TaylorSeer of every sublayer, order 1", f"< {module.theirs:.4f}"),
            fewer.check(f"against {math.ceil(STEPS * cost)} plain steps of as many FLOPs", f"< {fewer.theirs:.4f}"),
            Check(f"PSNR in dB where {STATED:g} was stated on others", stated, "within 10 %",
                  abs(stated / STATED - 1) <= 0.1),
            Check("tau = 0 is bit-exact", str(is_same), "equal", is_same),
            Check("without a gate after warm-up", blind, "finite, > 3 * ours", 3 * main.ours < blind < math.inf),
            Check("memory, ours over TaylorSeer of every sublayer", kept, "< 0.5", kept < 0.5),
            Check("FLOPs, full over ours", 1 / cost),
        ),
        figures={"tau": tau},
        notes="emoji, preset cpu: 5 blocks, so the one that always runs is a fifth of a step, in FLUX.1 a 57th; the "
        "gate's threshold and orders are those of other concepts",
        tried=(
            "21 prompts of other concepts, 17.8 full steps of ours, by which orders were chosen (order, order of the "
            "probe): (1, 1) 0.0199, (2, 1) 0.0170, at most 3 forecasts in a row 0.0177, warm-up of 2 as (1, 1); "
            "(1, 2), (1, 3), (1, 0) worse than (1, 1) on 12; divided differences 0.0165 for (2, 1), 0.0185 for (2, 2)",
            "there Lite TaylorSeer, order 1 to 3: 0.0239, 0.0194, 0.0197; warm-up of 4: 0.0236, 0.0187, 0.0192",
        ),
        weaker="the paper's card expects 10 to 40 % less than Lite TaylorSeer, whose orders were not tuned there",
    )  # fmt: skip


def full(ctx) -> Verdict:
    """FLUX.1-dev's shape with random weights at 1024 px: seconds of 50 steps, 34 of them forecast, blocks compiled.

    Random weights say nothing of confidence, so the mask is given: 16 full steps, the first three and the last among
    them; the probe is measured in every other.
    """
    model, run = flux_dev(ctx.device, 1024, STEPS)
    kept = {0, 1, 2, *(round(2 + 47 * place / 13) for place in range(1, 14))}
    forced = tuple(step for step in range(STEPS) if step not in kept)

    def gated():
        with apply(model, ConfidenceGatedTaylor(order=1, probe_order=1, forced=forced)):
            return run()

    ratio = paired_ratio(run, gated, repeats=10, warmup=3)
    torch.cuda.reset_peak_memory_stats()
    gated()
    peak = torch.cuda.max_memory_allocated() / 2**30
    step = ratio.first / STEPS
    skipped = (ratio.second - len(kept) * step) / len(forced) / step
    rate, bar = count_flops(run).total / ratio.first / 1e12, 0.6 * SUSTAINED[ctx.hardware]
    return Verdict(
        measured=f"seconds of {STEPS} steps of FLUX.1-dev's shape at 1024 px, {len(forced)} of them forecast",
        unit="s",
        ours=ratio.second,
        comparators={"every step": ratio.first},
        rule="ours < every step / 2.8",
        outcome=ratio.outcome(2.8),
        interval=(ratio.low, ratio.high),
        checks=(
            Check("a forecast step over a full one", skipped, "< 0.04; one of 57 blocks is 0.018", skipped < 0.04),
            Check("TFLOP/s of the dense run", rate, f">= {bar:.0f}, 60 % of the sustained rate", rate >= bar),
        ),
        figures={"peak_gib": peak, "full_steps": sorted(kept)},
        notes="random weights: time and memory alone; the interval is of the ratio every step / ours",
        weaker="the paper's 3.17 comes of the share that its gate skips; at 68 % no gate can give more than 3.02",
    )


def one_by_one(pipe, prompts):
    """Draws of single prompts: the gate decides for a whole batch, and users draw one picture."""
    parts = zip(prompts.texts, prompts.styles, prompts.seeds, strict=True)
    return [partial(draw_latents, pipe, Prompts(*((one,) for one in part)), STEPS) for part in parts]


def pictures(pipe, latents):
    """Pixels (B, 3, H, W) in [0, 1]."""
    return (pipe.autoencoder.decode(Latents(latents)) / 2 + 0.5).clamp(0, 1)


def decoded(pipe, draws):
    """The same draws as pictures."""
    return [lambda draw=draw: pictures(pipe, draw()) for draw in draws]


def searcher(ctx, pipe, prompts):
    """`find(make, quantity, target, within)`: a threshold found on concepts that are not among these prompts."""
    known = held_out_prompts("emoji", 4 * PROMPTS, first_seed=1000)
    keep = [index for index, text in enumerate(known.texts) if text not in prompts.texts]
    keep = keep[:: len(keep) // CHOSEN][:CHOSEN]
    chosen = Prompts(*(tuple(part[index] for index in keep) for part in (known.texts, known.styles, known.seeds)))
    draws, whole = one_by_one(pipe, chosen), draw_latents(pipe, chosen, STEPS)

    def find(make, quantity, target, within):
        ctx.say(f"threshold of {make.__name__} for a {quantity} of {target:.3g}")
        is_seen = quantity == "psnr"
        some = decoded(pipe, draws) if is_seen else draws
        result = (pictures(pipe, whole) if is_seen else whole).split(1)
        return find_threshold(
            lambda tau: accelerated(pipe, make(tau), some, result).mean(quantity), target, BETWEEN, within,
            rises=not is_seen,
        ).threshold  # fmt: skip

    return find


def premise(ctx, pipe, draws):
    """Rank correlation over steps of the probe's error and the last block's, one step in 5 full; mean over prompts."""
    ctx.say("errors of probe and target")
    forced = tuple(step for step in range(WARMUP, STEPS) if (step - WARMUP + 1) % 5)
    everywhere, alike = [], []
    for draw in draws:
        method = gate(0, forced)
        watch = Foregone(method)
        with apply(pipe, watch):
            draw()
        probe, target = method.traces[-1].errors, {step: error for (_, step), error in watch.errors.items()}
        for steps, found in ((forced, everywhere), *((forced[gap::4], alike) for gap in range(4))):
            found.append(rank_correlation([probe[step] for step in steps], [target[step] for step in steps]))
    return {"all": sum(everywhere) / len(everywhere), "equal gaps": sum(alike) / len(alike)}


def flops_of(pipe, draws, method):
    """FLOPs of some draws with a method; layouts are read before."""
    with apply(pipe, method):
        draws[0]()
        return count_flops(lambda: [draw() for draw in draws]).total


def bytes_kept(pipe, draw, method):
    """Most bytes that a method held."""
    with apply(pipe, method) as handle:
        draw()
        return handle.report().methods[0].kept
