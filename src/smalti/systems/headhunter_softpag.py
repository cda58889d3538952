"""HeadHunter chooses attention heads, and SoftPAG perturbs them softly, to guide a diffusion transformer.

A second pass in which chosen heads keep their own values in place of attention shows what to lead away from. Single
heads carry single things: a shape, a colour, a darkness. A greedy search finds those that serve a reward. The claim:
chosen heads draw pictures that fit their prompts better than the best whole layer does, at the same scale.
"""

import torch
from torch.nn import functional as F

from smalti.control.head_hunt import drawer, hunt_heads, pick
from smalti.control.head_sets import HeadSet, random_heads, whole_layers
from smalti.control.headhunter_softpag import PerturbedHeads
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.full_size import flux_dev
from smalti.evaluation.held_out_prompts import Prompts, held_out_prompts
from smalti.evaluation.paired import compare
from smalti.evaluation.rewards import JudgeReward, colourfulness, darkness
from smalti.evaluation.timing import paired_ratio
from smalti.ops.head_damage import soften
from smalti.seams.apply import apply
from smalti.seams.heads import read_heads

SYSTEM = System(
    slug="headhunter-softpag",
    uses=(
        "control.headhunter_softpag.PerturbedHeads",
        "control.head_hunt.hunt_heads",
        "control.head_sets.HeadSet",
        "ops.head_damage.soften",
        "ops.guidance_terms.guide_away",
        "evaluation.rewards.JudgeReward",
    ),
    models=("emoji", "judge-emoji"),
    data=("emoji",),
)
STEPS, PROMPTS, SCALE, GUIDANCE, HEADS = 10, 64, 2.0, 3.0, 6
STYLES = {"dark": darkness, "colourful": colourfulness}


def small(ctx) -> Verdict:
    """`emoji`, 10 steps, guidance of 3: how well the judge finds pictures of held-out prompts to fit them."""
    pipe, judge = ctx.model("emoji"), JudgeReward()
    prompts, pairs = split_prompts()
    pool = read_heads(pipe, lambda: drawer(pipe, 1)(pairs.first(1)))
    hunts = {}
    for name, reward, rounds, k, count in (
        ("quality", judge, 1, HEADS, 8),
        *((n, r, 2, 2, 4) for n, r in STYLES.items()),
    ):
        ctx.say(f"searching {rounds * k} of {len(pool)} heads for {name}")
        hunts[name] = hunt_heads(
            pipe, reward, pairs.first(count), rounds, k, PerturbedHeads(scale=SCALE), steps=STEPS, pool=pool,
            progress=False,
        )  # fmt: skip

    def draw(heads: HeadSet | None = None, steps=STEPS, some=prompts):
        if heads is None:
            return drawer(pipe, steps, GUIDANCE)(some)
        ctx.say(f"{heads.name}: {heads}")
        with apply(pipe, PerturbedHeads(heads, SCALE, GUIDANCE)):
            return drawer(pipe, steps, GUIDANCE)(some)

    def fits(pictures):
        return judge(pictures, prompts.texts).tolist()

    plain, ours = draw(), draw(hunts["quality"].heads)
    layers = {layer: fits(draw(whole_layers([layer]))) for layer in sorted({layer for layer, _ in pool})}
    best = max(layers, key=lambda layer: sum(layers[layer]))
    blind = [fits(draw(random_heads(pool, HEADS, seed))) for seed in ctx.seeds]
    blind_mean = torch.tensor(blind).mean(0).tolist()
    longer = fits(draw(steps=2 * STEPS))
    scores = {"guidance alone": fits(plain), f"layer {best}": layers[best]}
    rival = max(scores, key=lambda name: sum(scores[name]))
    main = compare(fits(ours), scores[rival], below=False)

    styles = {name: hunts[name].heads for name in STYLES}
    few = prompts.first(PROMPTS // 2)
    before = draw(some=few)
    alone = {name: draw(heads, some=few) for name, heads in styles.items()}
    both = draw(styles["dark"] | styles["colourful"], some=few)
    raised = {
        kind: compare(reward(pictures).tolist(), reward(before).tolist(), below=False)
        for name, reward in STYLES.items()
        for kind, pictures in ((f"{name} heads", alone[name]), (f"both sets, {name}", both))
    }
    sweep = {
        u: float((draw(hunts["quality"].heads.weighted(u), some=few) - before).square().mean())
        for u in (0.25, 0.5, 0.75, 1)
    }
    zero = torch.equal(draw(styles["dark"].weighted(0), some=few), before)
    return Verdict(
        measured=f"judge's similarity of picture and prompt, {STEPS} steps, w = {SCALE:g}, {HEADS} of {len(pool)} heads",
        unit="cosine",
        ours=main.ours,
        comparators={name: sum(some) / len(some) for name, some in {**scores, "random heads": blind_mean}.items()},
        rule="ours > the better of guidance alone and the best layer",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=prompts.seeds,
        checks=(
            compare(layers[best], scores["guidance alone"], below=False).check("best layer", "> guidance alone"),
            compare(fits(ours), blind_mean, below=False).check("heads against as many random ones", "> random"),
            compare(fits(ours), longer, below=False).check("heads against as many evaluations", f"> {2 * STEPS} steps"),
            *(one.check(name, f"> {one.theirs:.3f} without") for name, one in raised.items()),
            Check("u of 0.25 to 1, squared change", ", ".join(f"{one:.4f}" for one in sweep.values()), "rising",
                  list(sweep.values()) == sorted(sweep.values())),
            Check("u of 0 is bit-exact", str(zero), "equal", zero),
        ),
        figures={
            "heads": {name: str(one.heads) for name, one in hunts.items()},
            "on the pairs of the search": {name: {"plain": one.plain, "heads": one.reached} for name, one in hunts.items()},
            "generations": {name: one.generations for name, one in hunts.items()},
            "layers": {layer: sum(some) / len(some) for layer, some in layers.items()},
            "random": [sum(some) / len(some) for some in blind],
        },
        notes="emoji, preset cpu: 5 layers of 6 heads; heads are searched inside the claim without guidance on other "
        "prompts; of the layers the best on the claim's own prompts is taken",
    )  # fmt: skip


def split_prompts() -> tuple[Prompts, Prompts]:
    """Two thirds of the held-out concepts for the claim; the others, with other seeds, for the search."""
    every, others = held_out_prompts("emoji", 1000), held_out_prompts("emoji", 1000, first_seed=1000)
    captions = list(dict.fromkeys(every.texts))
    claim = [index for index, text in enumerate(every.texts) if captions.index(text) % 3 != 2]
    search = [index for index, text in enumerate(every.texts) if captions.index(text) % 3 == 2]
    mixed = sorted(search, key=lambda index: search.index(index) * 37 % len(search))
    return pick(every, [claim[index * len(claim) // PROMPTS] for index in range(PROMPTS)]), pick(others, mixed)


def full(ctx) -> Verdict:
    """FLUX.1-dev's shape with random weights at 1024 px: a head of every layer perturbed, blocks compiled."""
    model, run = flux_dev(ctx.device, 1024, 8)
    heads = {(layer, layer % 24): 0.5 for layer in range(57)}

    def guided():
        with apply(model, PerturbedHeads(heads, guidance=1.0)):
            return run()

    ratio = paired_ratio(guided, run, repeats=10, warmup=3)
    q, k, v = (torch.randn(1, 24, 4608, 128, device=ctx.device, dtype=torch.bfloat16) for _ in range(3))
    strength = torch.rand(1, 24, 1, 1, device=ctx.device)

    def attend(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    mixed = paired_ratio(
        lambda: soften(q, k, v, None, strength, attend), lambda: attend(q, k, v, None), repeats=50, warmup=10
    )
    share = 57 * (mixed.first - mixed.second) / (ratio.first / 8)
    return Verdict(
        measured="seconds of 8 guided steps of FLUX.1-dev's shape at 1024 px, a head of each of 57 layers, u = 0.5",
        unit="s",
        ours=ratio.first,
        comparators={"without": ratio.second},
        rule="ours < 2.1 * without",
        outcome=ratio.outcome(2.1, below=True),
        interval=(ratio.low, ratio.high),
        checks=(Check("mixing 57 layers over a guided step", share, "< 1 %", share < 0.01),),
        notes="random weights: time alone; the interval is of the ratio ours / without",
        weaker="the card's factor is 2, one forward more; 5 % are left for what is decided between compiled blocks",
    )
