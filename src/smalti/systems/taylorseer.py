"""TaylorSeer forecasts most evaluations of a diffusion transformer instead of running them.

Attention and feed-forward layers change smoothly from step to step. After a few full steps, one step in `interval` runs
them; in between a Taylor series over the steps gives their outputs. The claim: on held-out prompts the forecast ends
closer to the full run than plain reuse and than a shorter schedule of equal cost.
"""

import torch

from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.emoji_metrics import drawn_distance
from smalti.evaluation.flops import count_flops
from smalti.evaluation.full_size import SUSTAINED, flux_dev
from smalti.evaluation.held_out_prompts import draw_latents, held_out_prompts
from smalti.evaluation.paired import compare
from smalti.evaluation.same_cost import measure, steps_of_equal_cost
from smalti.evaluation.timing import paired_ratio
from smalti.seams.apply import apply
from smalti.zoo.loader import model_card

SYSTEM = System(
    slug="taylorseer",
    uses=("acceleration.taylorseer.TaylorSeer", "ops.taylor.TaylorState"),
    models=("emoji",),
    data=("emoji",),
)
STEPS, INTERVAL, PROMPTS = 50, 4, 64


def small(ctx) -> Verdict:
    """`emoji`, 50 steps, one full step in 4: distance of the final latents to the full run."""
    pipe = ctx.model("emoji")
    prompts, topics = held_out_prompts("emoji", PROMPTS), model_card("emoji")["settings"]["topics"]

    def draw(steps=STEPS, method=None, prompts=prompts):
        if method is None:
            return draw_latents(pipe, prompts, steps)
        with apply(pipe, method):
            return draw_latents(pipe, prompts, steps)

    ctx.say(f"full run of {STEPS} steps on {len(prompts)} prompts")
    full = measure(draw)
    runs = {}
    for order in (0, 1, 2, 3):
        ctx.say(f"order {order}")
        runs[order] = measure(lambda order=order: draw(method=TaylorSeer(INTERVAL, order)))
    fewer = steps_of_equal_cost(full, STEPS, runs[2])
    ctx.say(f"fewer steps: {fewer}")
    distances = {order: run.distances(full) for order, run in runs.items()}
    shorter = measure(lambda: draw(fewer)).distances(full)
    lite = measure(lambda: draw(method=TaylorSeer(INTERVAL, 1, lite=True))).distances(full)
    ctx.say("wall time")
    few = prompts.first(8)
    ratio = paired_ratio(
        lambda: draw(prompts=few), lambda: draw(method=TaylorSeer(INTERVAL, 2), prompts=few), repeats=3, warmup=1
    )
    ctx.say("Fréchet distance at interval 3")
    plain_fd = drawn_distance(pipe, topics, STEPS)
    with apply(pipe, TaylorSeer(3, 1)):
        fd = drawn_distance(pipe, topics, STEPS)
    main = compare(distances[1], distances[0], 0.7)
    same = torch.equal(draw(prompts=few), draw(method=TaylorSeer(1), prompts=few))

    return Verdict(
        measured=f"relative L2 distance of final latents to the full run, {STEPS} steps, interval {INTERVAL}, order 1",
        unit="relative L2",
        ours=main.ours,
        comparators={"reuse": main.theirs, f"{fewer} steps": sum(shorter) / len(shorter)},
        rule="ours < 0.7 * reuse",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=prompts.seeds,
        checks=(
            compare(distances[2], distances[0], 0.7).check("order 2", "< 0.7 * reuse"),
            compare(distances[1], shorter).check("order 1 against fewer steps", f"< {fewer} steps"),
            compare(distances[2], shorter).check("order 2 against fewer steps", f"< {fewer} steps"),
            Check("order 3", sum(distances[3]) / len(prompts)),
            Check("lite, order 1", sum(lite) / len(prompts)),
            Check("wall time, full over ours", ratio.median, ">= 2.5", ratio.median >= 2.5),
            Check("FLOPs, full over ours", full.flops / runs[2].flops),
            Check(
                "Fréchet distance at interval 3 over full", fd / plain_fd, "within 5 %", abs(fd / plain_fd - 1) < 0.05
            ),
            Check("interval 1 is bit-exact", str(same), "equal", same),
        ),
        figures={"fd_full": plain_fd, "fd_interval_3": fd, "seconds": {"full": ratio.first, "ours": ratio.second}},
        notes=f"emoji, preset cpu (64 tokens); fewer steps cost at least as many FLOPs as order 2: {fewer}",
    )


def full(ctx) -> Verdict:
    """FLUX.1-dev's shape with random weights at 1024 px: seconds of 50 steps against every step, blocks compiled."""
    model, run = flux_dev(ctx.device, 1024, STEPS)

    def forecast(lite=False):
        with apply(model, TaylorSeer(6, 1, lite=lite)):
            return run()

    ratio = paired_ratio(run, forecast, repeats=10, warmup=3)
    peaks = {}
    for name in ("full", "lite"):
        torch.cuda.reset_peak_memory_stats()
        forecast(name == "lite")
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    flops = count_flops(run).total
    rate, bar = flops / ratio.first / 1e12, 0.6 * SUSTAINED[ctx.hardware]
    return Verdict(
        measured=f"seconds of {STEPS} steps of FLUX.1-dev's shape at 1024 px, interval 6, order 1",
        unit="s",
        ours=ratio.second,
        comparators={"every step": ratio.first},
        rule="ours < every step / 3",
        outcome=ratio.outcome(3),
        interval=(ratio.low, ratio.high),
        checks=(Check("TFLOP/s of the dense run", rate, f">= {bar:.0f}, 60 % of the sustained rate", rate >= bar),),
        figures={"peak_gib": peaks, "flops": flops},
        notes="random weights: time and memory alone; the interval is of the ratio every step / ours",
        weaker="the paper's latency ratio is 3.53, on its own hardware and baseline",
    )
