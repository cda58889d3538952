"""GRAT lets groups of neighbouring image tokens share the few groups of keys that they attend to.

Nearby tokens look at nearly the same places, so a whole group can have one region: the groups in its row and column, or
those around it. The keys of a region are gathered, and attention runs dense and small. The claim: at the same share of
attended keys, regions end closer to full attention than keys chosen blindly.
"""

from smalti.acceleration.grat import GRAT, region_layout
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.full_size import SUSTAINED, flux_dev
from smalti.evaluation.held_out_prompts import draw_latents, held_out_prompts
from smalti.evaluation.paired import compare
from smalti.evaluation.same_cost import relative_distances
from smalti.evaluation.sparse_attention import largest_error, sparse_ratio
from smalti.evaluation.timing import paired_ratio
from smalti.seams.apply import apply

SYSTEM = System(
    slug="grat",
    uses=("acceleration.grat.GRAT", "ops.block_mask.BlockLayout", "ops.token_order.GroupOrder"),
    models=("emoji-1k",),
    data=("emoji",),
)
STEPS, PROMPTS, GROUP = 28, 32, (1, 2, 2)
RIVALS = {
    "block:1+cross": ("random:19", "strided:19"),
    "cross": ("random:15", "strided:15"),
    "block:2": ("random:25", "strided:25"),
}
MAIN = "block:1+cross"
"""30 % of the keys; the paper's card asks for 25 to 35 %."""


def small(ctx) -> Verdict:
    """`emoji-1k`, 16 x 16 tokens in groups of 2 x 2: distance of the final latents to full attention."""
    pipe = ctx.model("emoji-1k")
    prompts = held_out_prompts("emoji-1k", PROMPTS)

    def draw(region, guidance=1.0):
        ctx.say(f"{region}, guidance {guidance:g}")
        if region == "all":
            return draw_latents(pipe, prompts, STEPS, guidance_scale=guidance)
        with apply(pipe, GRAT(GROUP, region)):
            return draw_latents(pipe, prompts, STEPS, guidance_scale=guidance)

    full, guided_full = draw("all"), draw("all", 3.0)
    regions = [*RIVALS, *(rival for rivals in RIVALS.values() for rival in rivals)]
    distances = {region: relative_distances(draw(region), full) for region in regions}
    means = {region: sum(some) / len(some) for region, some in distances.items()}
    best = {region: min(rivals, key=lambda rival: means[rival]) for region, rivals in RIVALS.items()}
    found = {region: compare(distances[region], distances[best[region]], 0.7) for region in RIVALS}
    guided = (relative_distances(draw(region, 3.0), guided_full) for region in (MAIN, best[MAIN]))
    found[f"{MAIN} under guidance of 3"] = compare(next(guided), next(guided), 0.7)
    main, error = found.pop(MAIN), largest_error(region_layout((1, 16, 16), GROUP, "block:8", 16))
    ctx.say("wall time at 4,096 tokens")
    layout = region_layout((1, 64, 64), (1, 8, 8), "block:1")
    ratio = sparse_ratio(layout, ctx.device)
    return Verdict(
        measured=f"relative L2 distance of final latents to full attention, {STEPS} steps, region {MAIN}",
        unit="relative L2",
        ours=main.ours,
        comparators={name: means[name] for name in RIVALS[MAIN]},
        rule="ours < 0.7 * the better of random and strided groups at the same share",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=prompts.seeds,
        checks=(
            *(one.check(name, f"< 0.7 * {one.theirs:.4f}") for name, one in found.items()),
            Check("a region of all groups against full attention, largest error", error, "< 1e-5", error < 1e-5),
            Check(f"4,096 tokens, full over block:1 ({layout.attended:.0%})", ratio.median, ">= 2", ratio.low >= 2),
        ),
        figures={
            "distances": means,
            "attended": {region: region_layout((1, 16, 16), GROUP, region).attended for region in regions},
        },
        notes="emoji-1k, preset cpu: 256 tokens in groups of 2 x 2, not 1,024 in 4 x 4 as with the gpu preset; one "
        "branch a step, as in the guidance-distilled models of the paper: guidance multiplies what differs",
        tried=(
            "first recorded run, guidance of 3, cross at 23 % of the keys: 0.687 against 0.862, not 30 % lower",
            "12 prompts of other seeds, by which the setting was chosen: cross 0.72 / 0.91 under guidance of 3, 0.63 / "
            "1.00 without; block:1+cross 0.65 / 0.86 and 0.55 / 0.94; block:2 0.63 / 0.79 and 0.59 / 0.84",
        ),
    )  # fmt: skip


def full(ctx) -> Verdict:
    """Attention of a 4K and an 8K picture (24 heads of 128, bf16), and FLUX.1-dev's shape at 2048 px."""
    layouts = {side: region_layout((1, side, side), (1, 16, 16), "block:1") for side in (256, 512)}
    ratios = {side: sparse_ratio(layout, ctx.device, 24, 128) for side, layout in layouts.items()}
    model, run = flux_dev(ctx.device, 2048, 28)

    def sparse():
        with apply(model, GRAT((1, 16, 16), "block:1")):
            return run()

    whole = paired_ratio(run, sparse, repeats=10, warmup=3)
    main = ratios[512]
    return Verdict(
        measured="seconds of one attention over 262,144 tokens, region block:1 of 16 x 16 groups",
        unit="s",
        ours=main.second,
        comparators={"full": main.first},
        rule="ours < full / 10",
        outcome=main.outcome(10),
        interval=(main.low, main.high),
        checks=(
            Check("65,536 tokens, full over ours", ratios[256].median),
            Check("FLUX.1-dev's shape at 2048 px, 28 steps, every token over ours", whole.median),
        ),
        figures={"attended": layouts[512].attended, "flux_seconds": whole.first, "sustained": SUSTAINED[ctx.hardware]},
        notes="random numbers: time alone; the interval is of the ratio full / ours",
    )
