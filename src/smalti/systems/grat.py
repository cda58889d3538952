"""GRAT lets groups of neighbouring image tokens share the few groups of keys that they attend to.

Nearby tokens look at nearly the same places, so a whole group can have one region: the groups in its row and column, or
those around it. The keys of a region are gathered, and attention runs dense and small. The claim: at the same share of
attended keys, regions end closer to full attention than keys chosen blindly.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from smalti.acceleration.grat import GRAT, region_layout
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.full_size import SUSTAINED, flux_dev
from smalti.evaluation.held_out_prompts import draw_latents, held_out_prompts
from smalti.evaluation.paired import compare
from smalti.evaluation.same_cost import relative_distances
from smalti.evaluation.timing import paired_ratio
from smalti.ops.block_mask import block_attention
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

    full = draw("all")
    regions = [*RIVALS, *(rival for rivals in RIVALS.values() for rival in rivals)]
    distances = {region: relative_distances(draw(region), full) for region in regions}
    means = {region: sum(some) / len(some) for region, some in distances.items()}
    best = {region: min(rivals, key=lambda rival: means[rival]) for region, rivals in RIVALS.items()}
    found = {region: compare(distances[region], distances[best[region]], 0.7) for region in RIVALS}
    guided_full = draw("all", 3.0)
    guided, rival = (relative_distances(draw(region, 3.0), guided_full) for region in (MAIN, best[MAIN]))
    under_guidance = compare(guided, rival, 0.7)
    error = _exactness()
    ctx.say("wall time at 4,096 tokens")
    ratio, share = _wall_time(torch.device("cpu"), 64, (1, 8, 8), "block:1")
    cross, cross_share = _wall_time(torch.device("cpu"), 64, (1, 8, 8), "cross")
    main = found[MAIN]
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
            *(
                Check(region, one.ours, f"< 0.7 * {one.theirs:.4f}", one.outcome == "holds")
                for region, one in found.items()
                if region != MAIN
            ),
            Check(
                f"{MAIN} under guidance of 3", under_guidance.ours, f"< 0.7 * {under_guidance.theirs:.4f}",
                under_guidance.outcome == "holds",
            ),
            Check("a region of all groups against full attention, largest error", error, "< 1e-5", error < 1e-5),
            Check(
                f"attention, full over block:1 ({share:.0%} attended), 4,096 tokens",
                ratio.median,
                ">= 2",
                ratio.low >= 2,
            ),
            Check(f"attention, full over cross ({cross_share:.0%} attended), 4,096 tokens", cross.median),
        ),
        figures={
            "distances": means,
            "attended": {region: region_layout((1, 16, 16), GROUP, region).attended for region in regions},
        },
        notes=(
            "emoji-1k, preset cpu: 256 tokens in groups of 2 x 2, not the 1,024 tokens in 4 x 4 of the gpu preset; one "
            "branch a step, as in the guidance-distilled models of the paper: guidance multiplies what differs"
        ),
        tried=(
            "first recorded run, guidance of 3, region cross at 23 % of the keys: 0.687 against 0.862, not 30 % lower",
        ),
    )  # fmt: skip


def full(ctx) -> Verdict:
    """Attention of a 4K and an 8K picture (24 heads of 128, bf16), and FLUX.1-dev's shape at 2048 px."""
    ratios = {side: _wall_time(ctx.device, side, (1, 16, 16), "block:1", heads=24, width=128) for side in (256, 512)}
    model, run = flux_dev(ctx.device, 2048, 28)

    def sparse():
        with apply(model, GRAT((1, 16, 16), "block:1")):
            return run()

    whole = paired_ratio(run, sparse, repeats=10, warmup=3)
    main, share = ratios[512]
    return Verdict(
        measured="seconds of one attention over 262,144 tokens, region block:1 of 16 x 16 groups",
        unit="s",
        ours=main.second,
        comparators={"full": main.first},
        rule="ours < full / 10",
        outcome="holds" if main.low > 10 else "fails" if main.median <= 10 else "unresolved",
        interval=(main.low, main.high),
        checks=(
            Check("65,536 tokens, full over ours", ratios[256][0].median),
            Check("FLUX.1-dev's shape at 2048 px, 28 steps, every token over ours", whole.median),
        ),
        figures={"attended": share, "flux_seconds": whole.first, "sustained": SUSTAINED[ctx.hardware]},
        notes="random numbers: time alone; the interval is of the ratio full / ours",
    )


def _exactness() -> float:
    q, k, v = (torch.randn(1, 6, 272, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    layout = region_layout((1, 16, 16), GROUP, "block:8", 16)
    out = block_attention(q, k, v, layout, backend="gather")
    return (out - scaled_dot_product_attention(q, k, v)).abs().max().item()


def _wall_time(device, side, group, region, heads=6, width=32):
    """Seconds of plain attention over those of the sparse one on side x side tokens, and the attended share."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, heads, side * side, width, device=device, dtype=dtype) for _ in range(3))
    layout = region_layout((1, side, side), group, region)
    ratio = paired_ratio(
        lambda: scaled_dot_product_attention(q, k, v), lambda: block_attention(q, k, v, layout), repeats=10, warmup=3
    )
    return ratio, layout.attended
