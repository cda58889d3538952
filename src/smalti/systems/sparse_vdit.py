"""Sparse-vDiT finds once, offline, which sparse pattern every head of a video transformer can live with.

Some heads look around their frame, some at one place in all frames, some at a few columns, and which ones hardly depends
on the prompt. A search on a few clips decides head by head and writes a plan; heads of one pattern run in one call. The
claim: at half of the attention the searched plan ends at less than 0.7 of the distance to the dense clip at which the
best single pattern for all heads ends, and a random plan of the same modes.
"""

import torch

from smalti.acceleration.draft_attention import DraftAttention
from smalti.acceleration.head_plan import HeadPlan, agreement, shuffled_plan
from smalti.acceleration.plan_search import find_plan
from smalti.acceleration.sparse_vdit import SparseVDiT
from smalti.core.system import Check, System, Verdict
from smalti.data.emoji import load_emoji
from smalti.evaluation.draft_timing import whole_gain
from smalti.evaluation.emoji_metrics import spread
from smalti.evaluation.flops import count_flops
from smalti.evaluation.held_out_prompts import Prompts, draw_latents, held_out_prompts
from smalti.evaluation.paired import compare
from smalti.evaluation.pattern_losses import record_losses
from smalti.evaluation.pattern_timing import largest_error, mix_ratio, mode_times
from smalti.evaluation.same_cost import measure, relative_distances, steps_of_equal_cost
from smalti.evaluation.timing import paired_ratio
from smalti.ops.head_patterns import Mode, Patterns
from smalti.ops.token_order import Grid, group_order
from smalti.seams.apply import apply
from smalti.zoo.loader import model_card

SYSTEM = System(
    slug="sparse-vdit",
    uses=("acceleration.sparse_vdit.SparseVDiT", "acceleration.head_plan.HeadPlan", "acceleration.plan_search.find_plan",
          "evaluation.pattern_losses.HeadLosses", "ops.head_patterns.Patterns"),
    models=("clip",),
    data=("emoji",),
)  # fmt: skip
STEPS, PROMPTS, TARGET, DENSE, CALIBRATION = 28, 32, 0.5, 0.2, 8
WIDTHS, HALF, STARTS = Patterns(0.375, 0.375, 0.375), Patterns(0.5, 0.5, 0.5), (0.15, 0.3, 0.6)
BANDS: tuple[Mode, ...] = ("diagonal", "multi-diagonal", "stripes")
SHAPES: dict[str, tuple[Grid, int, int]] = {
    "HunyuanVideo": ((33, 45, 80), 256, 24), "Wan2.1": ((21, 45, 80), 0, 40), "CogVideoX1.5": ((11, 48, 85), 226, 48),
}  # fmt: skip
MIX: tuple[Mode, ...] = (
    "full",
    "diagonal",
    "multi-diagonal",
    "full",
    "diagonal",
    "multi-diagonal",
    "stripes",
    "diagonal",
)


def small(ctx) -> Verdict:
    """`clip`, 8 frames of 8 x 8 tokens, half of the attention: distance of the final latents to dense attention."""
    pipe, prompts = ctx.model("clip"), held_out_prompts("clip", PROMPTS)
    few, half = prompts.first(2), prompts.first(PROMPTS // 2)

    def draw(method=None, some=prompts, steps=STEPS):
        ctx.say(f"{len(some)} clips of {steps} steps, {method or 'dense attention'}")
        if method is None:
            return draw_latents(pipe, some, steps, guidance_scale=1.0)
        with apply(pipe, method):
            return draw_latents(pipe, some, steps, guidance_scale=1.0)

    losses = [record_losses(pipe, lambda some=some: draw(None, some), WIDTHS, every=2) for some in _calibration()]
    plans = [find_plan(one, target=TARGET, starts=STARTS) for one in (losses[0].joined(losses[1]), *losses)]
    ours, full = SparseVDiT(plans[0]), draw()
    fewer = steps_of_equal_cost(measure(lambda: draw(None, few)), STEPS, measure(lambda: draw(ours, few)))
    uniform = {mode: SparseVDiT(HeadPlan(rest=(mode,), patterns=WIDTHS), dense_steps=DENSE) for mode in BANDS}
    arms = {"ours": ours, **uniform, "random plan": SparseVDiT(shuffled_plan(plans[0], 0))}
    far = {name: relative_distances(draw(method), full) for name, method in arms.items()}
    far[f"{fewer} steps"] = relative_distances(draw(steps=fewer), full)
    means = {name: sum(some) / len(some) for name, some in far.items()}
    best = min((*BANDS, "random plan"), key=lambda name: means[name])
    main, shorter = compare(far["ours"], far[best], 0.7), compare(far["ours"], far[f"{fewer} steps"])
    others = {
        "multi-diagonal of half the rows in all steps": SparseVDiT(HeadPlan(rest=("multi-diagonal",), patterns=HALF)),
        "chosen online as in Sparse-VideoGen, oracle": DraftAttention(
            (1, 2, 2), 0.375, DENSE, "row", guide="frame-or-place"
        ),
    }
    beside = {name: compare(far["ours"][: len(half)], relative_distances(draw(method, half), full[: len(half)]), 0.7)
              for name, method in others.items()}  # fmt: skip
    costs = [count_flops(lambda method=method: draw(method, few)) for method in (None, ours)]
    seconds = paired_ratio(lambda: draw(None, few, 7), lambda: draw(ours, few, 7), repeats=6, warmup=1)
    dense = [find_plan(losses[0], eps=0.0), find_plan(losses[0], eps=1.0, weight=0.0)]
    same = all(torch.equal(draw(SparseVDiT(plan), few, 4), draw(None, few, 4)) for plan in dense)
    agreed, times = agreement(plans[1], plans[2]), mode_times(WIDTHS, (8, 8, 8), 16, ctx.device)
    return Verdict(
        measured=f"relative L2 distance of final latents to dense attention, {STEPS} steps, half of the attention",
        unit="relative L2",
        ours=main.ours,
        comparators={name: means[name] for name in means if name != "ours"},
        rule="ours < 0.7 * the best of one pattern for all heads and a random plan, at equal density",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=prompts.seeds,
        checks=(
            Check("density of the plan", plans[0].density(), "<= 0.5", plans[0].density() <= TARGET),
            Check("heads on which two halves of the calibration agree", agreed, "> 0.8", agreed > 0.8),
            *(one.check(f"{name}, 16 prompts", f"< 0.7 * {one.theirs:.4f}") for name, one in beside.items()),
            shorter.check(f"against {fewer} steps, of equal FLOPs", f"< {shorter.theirs:.4f}"),
            Check("eps 0, and lambda 0, are the dense model bit for bit", str(same), "equal", same),
            Check("FLOPs, dense over ours", costs[0].total / costs[1].total),
            Check("FLOPs of attention, dense over ours", costs[0].attention / costs[1].attention),
            Check("seconds, dense over ours", seconds.median),
        ),
        figures={"table": plans[0].table().splitlines(), "eps": plans[0].eps, "seconds of modes": times},
        notes="clip, preset cpu: 512 tokens and 16 of text; bands of 3 of 8 frames or rows. The single patterns have the "
        "same width and a dense first fifth, which brings them nearer than half of the keys in all steps; no guidance",
        tried=TRIED,
    )


TRIED = (
    "8 training captions and other seeds, 14 steps, checkpoints before the last: one pattern at half width in all steps "
    "0.22 (multi-diagonal), with a dense fifth 0.13; plans of widths 1/8, 1/4 and 3/8 in one group of steps 0.26, 0.18 "
    "and, with a dense fifth, 0.10; groups from 0.2 and 0.5 0.095; from 0.15, 0.3 and 0.6 0.082; losses as they are "
    "0.22; measured columns as good as the lattice",
)


def _calibration() -> tuple[Prompts, Prompts]:
    """Two halves of captions that the model was trained on."""
    settings = model_card("clip")["settings"]
    items = load_emoji("train", settings["styles"], settings["topics"]).items
    chosen = [items[index] for index in spread(len(items), 2 * CALIBRATION)]
    halves = [[*enumerate(chosen, 1000)][first::2] for first in (0, 1)]
    one, other = (
        Prompts(
            tuple(item.label for _, item in some),
            tuple(item.style for _, item in some),
            tuple(seed for seed, _ in some),
        )
        for some in halves
    )
    return one, other


def full(ctx) -> Verdict:
    """Attention of published shapes in bf16 with a fixed mix of modes, and what a whole model gains by FLOPs."""
    ratios = {name: mix_ratio(MIX * (heads // len(MIX)), Patterns(), grid, text, ctx.device)
              for name, (grid, text, heads) in SHAPES.items()}  # fmt: skip
    gains = {name: whole_gain(group_order(grid, (1, 1, 1)), 128 * heads, ratios[name].median, dense=0)
             for name, (grid, _, heads) in SHAPES.items()}  # fmt: skip
    main, error = ratios["HunyuanVideo"], largest_error(Patterns(), (4, 15, 20), 10, ctx.device)
    return Verdict(
        measured="seconds of one attention of HunyuanVideo's shape, 119,056 tokens, a quarter of the heads full",
        unit="s",
        ours=main.second,
        comparators={"flash": main.first},
        rule="ours < flash / 2.1",
        outcome=main.outcome(2.1),
        interval=(main.low, main.high),
        checks=(
            *(Check(f"{name}, flash over ours", ratio.median) for name, ratio in ratios.items()),
            *(Check(f"{name}, whole model projected", gain) for name, gain in gains.items()),
            Check("largest error to the token masks, float32", error, "< 1e-2", error < 1e-2),
        ),
        figures={"seconds of modes": mode_times(Patterns(), *SHAPES["HunyuanVideo"][:2], ctx.device, 8, 128)},
        notes="random numbers: time alone; the interval is of the ratio; flash / 2.1 is what attention needs for the "
        "paper's 1.85 end to end; the mix of modes is not published: 2 of 8 heads full, 5 in bands, 1 in stripes",
    )
