"""RAS runs, in most steps, only the half of the image tokens that are in focus; the others repeat their prediction.

What a step adds to a token tells how much the next one will; tokens that were left out come back by a counter, and
attention sees their old keys. The claim: at the same share of tokens the final latents end closer to the dense run than
with tokens drawn blindly, and closer than a shorter dense run of equal cost.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch

from smalti.acceleration.ras import RAS, longest_skip, walk
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.full_size import sd3_medium
from smalti.evaluation.held_out_prompts import draw_latents, held_out_prompts
from smalti.evaluation.paired import compare
from smalti.evaluation.same_cost import measure, relative_distances, steps_of_equal_cost
from smalti.evaluation.timing import paired_ratio
from smalti.evaluation.token_skipping import skipping_ratio, token_path
from smalti.seams.apply import apply

SYSTEM = System(
    slug="ras",
    uses=("acceleration.ras.RAS", "core.tokens.TokensMethod", "seams.token_rows.TokenRows", "ops.token_subset.gather"),
    models=("emoji-1k",),
    data=("emoji",),
)
STEPS, PROMPTS = 28, 32
OURS = RAS(0.5, start=12, resets=(20,), skip="high")


def small(ctx) -> Verdict:
    """`emoji-1k`, 256 tokens, half of them from step 12 on: distance of the final latents to the dense run."""
    pipe, prompts = ctx.model("emoji-1k"), held_out_prompts("emoji-1k", PROMPTS)
    few = prompts.first(8)

    def draw(method=None, steps=STEPS, guidance=1.0, some=prompts):
        ctx.say(str(method or f"{steps} dense steps, guidance {guidance:g}"))
        with apply(pipe, method) if method else nullcontext():
            return draw_latents(pipe, some, steps, guidance_scale=guidance)

    dense = measure(draw)
    with apply(pipe, OURS):  # its tokens are read in the first of two runs; the second counts FLOPs
        ours = measure(draw)
    steps = steps_of_equal_cost(dense, STEPS, ours)
    fewer = f"{steps} steps"
    rivals = {"random": replace(OURS, selection="random"), "no reset": replace(OURS, resets=())}
    rivals |= {"no starvation": replace(OURS, starvation=0.0), "no K/V cache": replace(OURS, kv_cache=False)}
    rivals |= {"paper's setting": RAS(), "paper's setting, random": RAS(selection="random")}
    distances = {name: relative_distances(draw(one), dense.latents) for name, one in rivals.items()}
    distances |= {"ours": ours.distances(dense), fewer: relative_distances(draw(steps=steps), dense.latents)}
    means = {name: sum(some) / PROMPTS for name, some in distances.items()}
    plain = draw(guidance=3.0, some=few)
    pair = [relative_distances(draw(one, STEPS, 3.0, few), plain) for one in (OURS, rivals["random"])]
    guided = compare(pair[0], pair[1], 0.8)
    same, path = torch.equal(draw(some=few), draw(RAS(1.0), some=few)), token_path(pipe, few, STEPS)
    longest = {k: longest_skip(walk(RAS(resets=(), starvation=k), path)) for k in (0.0, 1.0)}
    ctx.say("wall time")
    ratio = skipping_ratio(RAS(), 32, STEPS)
    factor, rival = min((0.8, "random"), (1.0, fewer), key=lambda one: one[0] * means[one[1]])
    main = compare(distances["ours"], distances[rival], factor)

    def against(name, factor=1.0, first="ours"):
        rule = f"< {'' if factor == 1 else f'{factor:g} * '}{means[name]:.4f}"
        return compare(distances[first], distances[name], factor).check(f"{first} against {name}", rule)

    return Verdict(
        measured=f"relative L2 distance of final latents to the dense run, {STEPS} steps, half the tokens from step 12",
        unit="relative L2",
        ours=main.ours,
        comparators={name: means[name] for name in ("random", fewer)},
        rule="ours < the smaller of 0.8 * random and fewer steps of equal cost",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=prompts.seeds,
        checks=(
            against("random", 0.8), against(fewer), against("no reset"), against("no starvation"),
            against("no K/V cache"), against("paper's setting, random", 0.8, "paper's setting"),
            against(fewer, 1.0, "paper's setting"),
            guided.check("ours against random under guidance of 3", f"< 0.8 * {guided.theirs:.4f}"),
            Check("most steps in a row without running, starvation on", longest[1.0], "<= 3", longest[1.0] <= 3),
            Check("the same, starvation off", longest[0.0], "> 3", longest[0.0] > 3),
            Check("wall time at 1,024 tokens, dense over paper's", ratio.median, ">= 1.4", ratio.low >= 1.4),
            Check("FLOPs, dense over ours", dense.flops / ours.flops),
            Check("ratio 1 is bit-exact", str(same), "equal", same),
        ),
        notes="emoji-1k, preset cpu; its evenly spaced first steps carry most of the error, so 12 of them are dense",
        tried=(
            "8 prompts of other seeds, by which the setting was chosen: start 4 0.113 (random 0.163, 17 steps 0.054); "
            "start 8 0.053 (0.078, 0.045 with 19 steps); shift 3 0.124 (0.188); 12 prompts, start 12 and one reset: "
            "0.032 (21 steps 0.041)",
            "a first run of the claim counted the reading of the tokens with every draw: ours 0.0266, 23 steps 0.0233",
        ),
        weaker="the paper's start is 4; here fewer steps end closer with it, see the checks",
    )  # fmt: skip


def full(ctx) -> Verdict:
    """Stable Diffusion 3 medium's shape at 1024 px with guidance: seconds of 28 steps, blocks compiled."""
    model, run = sd3_medium(ctx.device, 1024, STEPS)

    def ours(ratio):
        with apply(model, RAS(ratio)):
            return run()

    half, quarter = (paired_ratio(run, lambda ratio=ratio: ours(ratio), 10, 3) for ratio in (0.5, 0.25))
    return Verdict(
        measured=f"seconds of {STEPS} steps of Stable Diffusion 3 medium's shape at 1024 px, a quarter of the tokens",
        unit="s",
        ours=quarter.second,
        comparators={"dense": quarter.first},
        rule="ours < dense / 1.8",
        outcome=quarter.outcome(1.8),
        interval=(quarter.low, quarter.high),
        checks=(Check("half of the tokens, dense over ours", half.median, ">= 1.35", half.low >= 1.35),),
        notes="random weights: time alone; 41 % and 61 % of the image tokens run; the interval is of dense / ours",
        weaker="the paper reaches 2.36 on its own hardware, at a smaller share of the tokens",
    )
