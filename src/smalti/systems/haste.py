"""HASTE aligns a denoiser's features and attention maps with a frozen encoder's, and stops early.

What helps a model at first holds it back later: an encoder's view of the clean picture is not what a good denoiser
ends with. The claim: of two trainings that differ in nothing else, the one whose alignment ends at 30 % of the steps
has the lower velocity loss on held-out concepts.
"""

from dataclasses import replace
from statistics import fmean

import torch

from smalti.core.protocols import Batch, Cond
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.arms import run_arms
from smalti.evaluation.full_size import sit_xl
from smalti.evaluation.timing import paired_ratio
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.aligned_arm import DEPTH, WIDTH, arm_config, train_aligned_arm, with_pictures
from smalti.recipes.emoji_arm import GRID, feature_tables, stock
from smalti.tokenizers.vision_backends import load_teacher
from smalti.training.alignment import AlignedModel, AlignedObjective, Alignment
from smalti.training.bare_step import bare_step
from smalti.training.haste import HASTESettings, HolisticAlignment, small_pairs
from smalti.training.repa import REPA, REPASettings, TeacherPort
from smalti.training.stopping import ANGLE, StopAt, StopOnConflict, StopRule

SYSTEM = System(
    slug="haste",
    uses=(
        "training.haste.HolisticAlignment", "training.teacher_attention.AttentionTeacher",
        "training.stopping.Stopping", "training.gradient_angle.gradient_cosine",
        "training.feature_alignment.projector", "training.alignment.AlignedModel",
        "ops.attention_maps.attention_cross_entropy", "seams.taps.Taps", "seams.attention_watch.AttentionWatch",
        "recipes.aligned_arm.train_aligned_arm",
    ),
    models=("emoji", "vit-self"),
    data=("emoji",),
)  # fmt: skip
ARMS = ("plain", "repa", "haste", "never stopped")
STEPS, PHASE, TEACHER, WATCHED, DRAWN = 450, 0.3, "vit-self", 30, (100, 200)
SETTINGS = HASTESettings(2, small_pairs(DEPTH, 6), hidden=4 * WIDTH)
"""By the card's rules for small models; the teacher has 6 blocks."""


def small(ctx) -> Verdict:
    """Four arms of a micro DiT on cached latents: plain, features all the way, HASTE, HASTE without its end."""
    feature_tables(TEACHER)
    steps = round(STEPS * ctx.budget)
    arms = run_arms("haste", list(ARMS), ctx.seeds, ctx.scratch, {"steps": steps}, say=ctx.say)
    main = arms.compare("haste", "never stopped", "held-out loss")
    losses = arms.means("held-out loss")
    early, late = (arms.mean("never stopped", f"gradient cosine, {when}") for when in ("first", "last"))
    first, last, floor = (
        arms.mean("never stopped", f"attention, {what}") for what in ("first", "last", "of the teacher")
    )
    distances = {name: arms.means(name) for name in ("distance, 25 %", "distance, 50 %", "distance")}
    quarter = distances["distance, 25 %"]
    return Verdict(
        measured=f"velocity loss on held-out concepts after {steps} steps of 32, the alignment ended at {PHASE:.0%}",
        unit="loss",
        ours=main.ours,
        comparators={name: value for name, value in losses.items() if name != "haste"},
        rule="ours < never stopped",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=ctx.seeds,
        checks=(
            arms.compare("haste", "plain", "held-out loss").check("held-out loss beside plain", "< plain"),
            arms.compare("haste", "repa", "held-out loss").check("held-out loss beside REPA all the way", "< repa"),
            Check("FD at 25 % of the steps", quarter["haste"], "<= repa", quarter["haste"] <= quarter["repa"]),
            *(
                Check(name, ", ".join(f"{arm} {value:.0f}" for arm, value in some.items()))
                for name, some in distances.items()
            ),
            Check("attention cross-entropy, last", last, "nearer the teacher's", last - floor < 0.5 * (first - floor)),
            Check("attention cross-entropy, first (log 64 = 4.16)", first),
            Check("attention entropy of the teacher", floor),
            Check("gradient cosine, last third", late, "< first third", late < early),
            Check("gradient cosine, first third", early),
        ),
        figures={name: {key: arms.values(name, key) for key in arms.figures[name][0]} for name in ARMS},
        notes=f"DiT {DEPTH} x {WIDTH}, 64 tokens, teacher {TEACHER}, {SETTINGS}",
    )


def full(ctx) -> Verdict:
    """SiT-XL/2 on latents of 256 px, a teacher of DINOv2-B's shape: a step in both phases beside a plain one."""
    device, samples = ctx.device, 128 if torch.cuda.mem_get_info()[1] > 100 * 2**30 else 48
    teacher = load_teacher("random-dinov2-b", (16, 16)).to(device, torch.bfloat16)
    pixels = torch.rand(samples, 3, 256, 256, device=device) * 2 - 1
    cond = Cond(label=torch.randint(1000, (samples,), device=device), extra={"pixels": pixels})
    batch = Batch(torch.randn(samples, 4, 32, 32, device=device), cond, torch.arange(samples))
    shared, steps = sit_xl(device).state_dict(keep_vars=True), {}
    for name in ("plain", "first phase", "second phase"):
        model, objective = sit_xl(device), FlowMatching()
        model.load_state_dict(shared, assign=True)
        if name != "plain":
            model = AlignedModel(model, [HolisticAlignment(1152, teacher)]).to(device)
            objective = AlignedObjective(objective, model)
        if name == "second phase":
            model.stop(["haste"])
        steps[name] = bare_step(model.train(), objective, batch, torch.bfloat16)
    second, first = (
        paired_ratio(steps[name], steps["plain"], repeats=10, warmup=3) for name in ("second phase", "first phase")
    )
    return Verdict(
        measured=f"seconds of a training step of SiT-XL/2, {samples} samples, bf16, in the second phase",
        unit="s",
        ours=second.first,
        comparators={"plain": second.second, "first phase": first.first},
        rule="ours < 1.01 * plain",
        outcome=second.outcome(1.01, below=True),
        interval=(second.low, second.high),
        checks=(Check("first phase, over plain", first.median, "< 1.25", first.high < 1.25),),
        notes="random weights: time alone; the interval is of the ratio ours / plain",
    )


def arm(name: str, seed: int, steps: int) -> dict[str, float]:
    """Trains one arm and measures it."""
    losses: list[Alignment] = []
    stops: list[StopRule] = []
    source = None
    torch.manual_seed(seed)
    if name == "repa":  # features alone, cached, all the way
        teacher = TeacherPort("teacher", 192)
        losses = [REPA(WIDTH, [teacher], REPASettings(SETTINGS.depth, hidden=SETTINGS.hidden))]
        source = replace(stock().train, features={"teacher": [feature_tables(TEACHER)[0]]})
    elif name != "plain":
        losses += [HolisticAlignment(WIDTH, load_teacher(TEACHER, GRID), SETTINGS)]
        source = with_pictures()
    if name == "haste":
        stops = [StopAt(("haste",), round(PHASE * steps))]
    elif name == "never stopped":
        stops = [StopOnConflict(("haste",), threshold=-1.0, every=WATCHED)]  # watches alone
    marks = (steps // 4, 2 * (steps // 4))
    done = train_aligned_arm(arm_config(steps, seed), losses, stops, source, marks, DRAWN[0])
    figures = {
        "held-out loss": done.trained.held_out_loss,
        "distance": done.trained.distance(DRAWN[1], guidance=1.0),
        "images per second": done.trained.images_per_second,
        **{f"distance, {share} %": done.distances[step] for share, step in zip((25, 50), marks, strict=True)},
    }
    if name == "never stopped":
        cosines, apart = done.curve(ANGLE), done.curve("attention cross-entropy")
        part = max(1, len(cosines) // 3)
        figures |= {
            "gradient cosine, first": fmean(cosines[:part]), "gradient cosine, last": fmean(cosines[-part:]),
            "attention, first": apart[0], "attention, last": apart[-1],
            "attention, of the teacher": done.curve("attention entropy of the teacher")[-1],
        }  # fmt: skip
    return figures
