"""SRA lets a denoiser teach itself: an early block follows a late block of its own average, which sees less noise.

Late blocks under little noise know more of what is shown than early ones under much; the average has them at hand, so
no encoder is needed, and what has none (digits here, sounds, molecules) can be helped in the same way. The claim: at
equal steps, pictures of held-out concepts come out closer to real ones.
"""

from typing import Any

import torch

from smalti.backbones.dit import DiT
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.arms import Arms, run_arms
from smalti.evaluation.full_size import sit_xl
from smalti.evaluation.timing import paired_ratio
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.paired_noise import StraightPairs
from smalti.recipes.aligned_arm import DEPTH, WIDTH, arm_config, train_aligned_arm
from smalti.recipes.digits_arm import SHAPE, digits_source, train_digits_arm
from smalti.recipes.emoji_arm import group_probe, stock
from smalti.training.alignment import AlignedModel, AlignedObjective
from smalti.training.bare_step import bare_step
from smalti.training.config import TrainConfig
from smalti.training.ema import EMA
from smalti.training.sra import DEVIATION, SelfAlignment, SRASettings

SYSTEM = System(
    slug="sra",
    uses=(
        "training.sra.SelfAlignment", "objectives.paired_noise.StraightPairs", "objectives.beta_pairs.BetaPairs",
        "objectives.two_groups.TwoGroupFlowMatching", "seams.group_watch.GroupWatch", "seams.truncated.truncated",
        "training.alignment.AlignedModel", "seams.taps.Taps", "training.stopping.StopOnCollapse",
        "evaluation.feature_map.feature_pictures", "recipes.aligned_arm.train_aligned_arm",
        "recipes.digits_arm.train_digits_arm",
    ),
    models=("emoji",),
    data=("emoji",),
)  # fmt: skip
STEPS, DIGIT_STEPS, LATE, START = 400, 600, 1.3, 100
EARLY_BLOCK, LATE_BLOCK = 2, 4
SLOW = "plain, as long"
ARMS = {
    "plain": None,
    SLOW: None,
    "sra": SRASettings(EARLY_BLOCK, LATE_BLOCK, start=START),
    "swapped": SRASettings(LATE_BLOCK, EARLY_BLOCK, start=START),
    "own noise": SRASettings(EARLY_BLOCK, LATE_BLOCK, start=START, pairs=StraightPairs(has_own_noise=True)),
}
MAIN, CONTROLS = ("plain", SLOW, "sra"), ("swapped", "own noise")


def small(ctx) -> Verdict:
    """A micro DiT on cached latents: plain, SRA, plain for as long, two controls; and plain beside SRA on digits."""
    stock()
    digits_source("train")
    steps, few = round(STEPS * ctx.budget), ctx.seeds[:2]

    def run(names, seeds, function="arm", count=steps) -> Arms:
        return run_arms("sra", names, seeds, ctx.scratch, {"steps": count}, function=function, say=ctx.say)

    arms, controls = run(MAIN, ctx.seeds), run(CONTROLS, few)
    digits = run(("plain", "sra"), few, "digits_arm", round(DIGIT_STEPS * ctx.budget))
    main, probe = arms.compare("sra", "plain", "distance", 0.95), arms.means("probe")
    ours = sum(arms.values("sra", "distance")[: len(few)]) / len(few)
    kept = min(arms.values("sra", "spread"))

    def must_be_worse(name: str) -> Check:
        found = controls.mean(name, "distance")
        return Check(f"distance, {name}", found, "> ours at the same seeds", found > ours)

    return Verdict(
        measured=f"FD-EfficientNetLite0 of 400 held-out captions without guidance, after {steps} steps of 32",
        unit="FD",
        ours=main.ours,
        comparators={
            **{name: value for name, value in arms.means("distance").items() if name != "sra"},
            **controls.means("distance"),
        },
        rule="ours < 0.95 * plain",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=ctx.seeds,
        checks=(
            arms.compare("sra", SLOW, "distance").check(f"beside plain with {LATE:g} times the steps", "< it"),
            *map(must_be_worse, CONTROLS),
            Check("linear probe, plain", probe["plain"]),
            Check("linear probe, ours", probe["sra"], ">= plain + 0.03", probe["sra"] >= probe["plain"] + 0.03),
            Check("least deviation of the teacher, of its first", kept, "> 0.1: no collapse", kept > 0.1),
            Check("images a second, over plain", arms.mean("sra", "speed") / arms.mean("plain", "speed")),
            *(
                Check(f"digits, {what}", ", ".join(f"{arm} {value:.4g}" for arm, value in digits.means(what).items()))
                for what in ("accuracy", "distance", "held-out loss")
            ),
        ),
        figures={
            name: [dict(one) for one in some]
            for name, some in (*arms.figures.items(), *controls.figures.items())
        },
        notes=f"DiT {DEPTH} x {WIDTH}, 64 tokens, block {EARLY_BLOCK} follows {LATE_BLOCK} from step {START} on",
    )  # fmt: skip


def full(ctx) -> Verdict:
    """SiT-XL/2 on latents of 256 px: a training step with the truncated average beside a plain one."""
    device, samples = ctx.device, 128 if torch.cuda.mem_get_info()[1] > 100 * 2**30 else 48
    cond = Cond(label=torch.randint(1000, (samples,), device=device))
    batch = Batch(torch.randn(samples, 4, 32, 32, device=device), cond, torch.arange(samples))
    plain = sit_xl(device)
    average = EMA(plain, 0.9999).model
    model = sit_xl(device)
    model.load_state_dict(plain.state_dict(keep_vars=True), assign=True)
    aligned = AlignedModel(model, [SelfAlignment(1152, SRASettings(8, 20))]).to(device)

    steps = [
        bare_step(one.train(), objective, batch, torch.bfloat16, TrainState(ema=average))
        for one, objective in ((aligned, AlignedObjective(FlowMatching(), aligned)), (plain, FlowMatching()))
    ]
    ratio = paired_ratio(*steps, repeats=10, warmup=3)
    return Verdict(
        measured=f"seconds of a training step of SiT-XL/2, {samples} samples, bf16, with the average up to block 20",
        unit="s",
        ours=ratio.first,
        comparators={"plain": ratio.second},
        rule="ours < 1.3 * plain",
        outcome=ratio.outcome(1.3, below=True),
        interval=(ratio.low, ratio.high),
        notes="random weights: time alone; the interval is of the ratio ours / plain",
    )


def arm(name: str, seed: int, steps: int) -> dict[str, float]:
    """Trains one arm on emoji and measures it."""
    chosen = ARMS[name]
    torch.manual_seed(seed)
    losses = [] if chosen is None else [SelfAlignment(WIDTH, chosen)]
    done = train_aligned_arm(arm_config(round(LATE * steps) if name == SLOW else steps, seed), losses)
    figures = {
        "distance": done.trained.distance(guidance=1.0),
        "held-out loss": done.trained.held_out_loss,
        "probe": group_probe(done.trained.model, EARLY_BLOCK),
        "speed": done.trained.images_per_second,
    }
    spread = done.curve(DEVIATION)
    return {**figures, "spread": min(spread) / spread[0]} if spread else figures


def digits_arm(name: str, seed: int, steps: int) -> dict[str, float]:
    """Trains one arm on digits, for which there is no encoder, and measures it."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = SHAPE
    model = DiT(depth=DEPTH, heads=WIDTH // 32, head_dim=32, **shape)
    chosen = ARMS[name]
    losses = [] if chosen is None else [SelfAlignment(WIDTH, chosen)]
    config = TrainConfig(
        steps=steps, batch=32, learning_rate=2e-3, warmup=min(50, steps), decay="linear-cooldown", ema=0.99, seed=seed,
        eval_every=steps, eval_samples=1000,
    )  # fmt: skip
    done = train_digits_arm(model, config, losses=losses)
    report = done.report()
    return {"accuracy": report.accuracy, "distance": report.distance, "held-out loss": done.held_out_loss}
