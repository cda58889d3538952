"""In-Context LoRA draws a set of related pictures as the panels of one, after a small adapter was taught how.

Related pictures are tiled on a canvas, one caption tells all panels, and an ordinary LoRA learns on a few such sets
that panels belong together; known panels can be given. The claim: after 100 pairs of emoji by one vendor, two held-out
concepts come out in one style far more often than from the bare model's canvas, from two separate pictures, or after
the same training on mixed-up pairs, although no caption names a style.
"""

from typing import Any

import torch

from smalti.core.protocols import Batch, Cond
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.arms import run_arms
from smalti.evaluation.full_size import flux_dev
from smalti.evaluation.paired import compare
from smalti.evaluation.timing import median_seconds, paired_ratio
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.panel_arm import (
    PanelArm,
    draw_apart,
    draw_sets,
    given_agreement,
    measure,
    pipeline,
    prompt_sets,
    reader,
    real_accuracy,
    train_panel_arm,
)
from smalti.training.bare_step import bare_step
from smalti.training.lora import LoRASettings, add_lora, merge_loras

SYSTEM = System(
    slug="in-context-lora",
    uses=(
        "ops.canvas.PanelLayout", "data.joint_captions.JointCaptioner", "data.panels.style_sets",
        "tokenizers.marked_text.MarkedTextEncoder",
        "data.avatar_panels.avatar_sets", "training.lora.add_lora", "training.panel_source.panel_source",
        "control.fill_panels.FillPanels", "control.known_panels.KnownPanels",
        "evaluation.panel_metrics.SharedReader", "recipes.panel_arm.train_panel_arm",
    ),
    models=("emoji",),
    data=("emoji",),
)  # fmt: skip
TRAINED = {"in-context lora": PanelArm(), "mixed-up pairs": PanelArm(mixed=True), "20 sets": PanelArm(sets=20)}
STEPS, DRAWN = 600, 64
LEAST = 0.75


def small(ctx) -> Verdict:
    """Three trainings, the bare model on the same canvases, and pictures drawn apart, on the same 64 prompts."""
    reader()
    settings = {"steps": round(STEPS * ctx.budget)}
    names = ("in-context lora", "mixed-up pairs", "20 sets", "base canvas", "two pictures")

    def say(line: str) -> None:
        ctx.say(line.split(", pair 0 ")[0])

    arms = run_arms("in-context-lora", names, ctx.seeds[:1], ctx.scratch, settings, say=say)
    pairs = {name: [arms.mean(name, f"pair {number}") for number in range(DRAWN)] for name in names}
    agreements, match = arms.means("agreement"), arms.means("match")
    ours, closest = names[0], max(("mixed-up pairs", "base canvas", "two pictures"), key=lambda name: agreements[name])
    compared = compare(pairs[ours], [max(LEAST, agreements[closest])] * DRAWN, below=False)
    given, floor = arms.mean(ours, "given"), match["base canvas"] - 0.05
    return Verdict(
        measured=f"share of {DRAWN} pairs of held-out concepts whose panels are in one style, read by a classifier",
        unit="share",
        ours=agreements[ours],
        comparators={name: agreements[name] for name in ("mixed-up pairs", "base canvas", "two pictures")},
        rule=f"ours > {LEAST:g} and > the best of the others",
        outcome=compared.outcome,
        interval=(compared.low, compared.high),
        seeds=ctx.seeds[:1],
        checks=(
            compare(pairs[ours], pairs[closest], below=False).check(f"ours beside {closest}", f"> {closest}"),
            Check("panels that fit their own caption", match[ours], "> base canvas - 0.05", match[ours] > floor),
            Check("panels that fit their own caption, base canvas", match["base canvas"]),
            Check("panels that fit their own caption, two pictures", match["two pictures"]),
            Check("right panels in the style of a given left one", given, ">= 0.7", given >= 0.7),
            Check("right panels in the style of a given left one, base", arms.mean("base canvas", "given")),
            Check("agreement after 20 sets", agreements["20 sets"]),
            Check("real held-out pictures whose style is read rightly", real_accuracy()),
        ),
        figures={
            name: {key: value for key, value in arms.figures[name][0].items() if not key.startswith("pair ")}
            for name in names
        },
        notes=f"{settings['steps']} steps of 8 canvases, rank 8, no style label; prompts of concepts never trained on",
        tried=(
            "400 steps, seed 0, 32 pairs: agreement 0.78, own caption fits 0.42 with both captions read as one text, "
            "0.78 and 0.50 with each read alone, which the claim does; bare canvas (48 pairs) fits 0.53, apart 0.92",
        ),
    )


def full(ctx) -> Verdict:
    """A LoRA step on FLUX.1-dev's shape, canvas 1024 x 1536, batch 4, rank 16; what an adapter costs in sampling."""
    device, rows, columns, samples = ctx.device, 64, 96, 4
    model: Any = flux_dev(device, 1024, 1)[0]
    given = {"device": device}
    cond = Cond(torch.randn(1, 512, 4096, **given), torch.randn(1, 768, **given))
    x, t = torch.randn(1, 64, rows, columns, **given), torch.full((1,), 0.5, **given)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(x, t, cond)

    plain = median_seconds(call, warmup=4)
    add_lora(model, LoRASettings(16))
    with_adapter = median_seconds(call, warmup=4)
    model.enable_gradient_checkpointing()
    batch = Batch(x.expand(samples, -1, -1, -1), Cond.cat([cond] * samples), torch.arange(samples))
    step = bare_step(model.train(), FlowMatching(shift=3.0), batch, None)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(step, repeats=5)
    memory = torch.cuda.max_memory_allocated(device) / 2**30
    merge_loras(model.eval())
    again = paired_ratio(call, call, repeats=10, warmup=4)
    merged = again.first / plain
    return Verdict(
        measured="seconds of a forward of FLUX.1-dev's shape at 1024 x 1536 with a merged adapter, bf16, compiled",
        unit="s",
        ours=again.first,
        comparators={"plain": plain, "unmerged adapter": with_adapter},
        rule="ours < 1.02 * plain",
        outcome="holds" if merged < 1.02 else "fails",
        checks=(
            Check("seconds of a LoRA step, batch 4, rank 16", seconds),
            Check("GiB of a LoRA step", memory),
            Check("unmerged adapter, over plain", with_adapter / plain),
        ),
        notes="random weights: time and memory alone",
    )


def arm(name: str, seed: int, steps: int) -> dict[str, float]:
    """Trains one arm, or takes the bare model, and measures it."""
    sets, pipe, first = prompt_sets(DRAWN, seed), pipeline(), 1000 * (seed + 1)
    if name == "two pictures":
        return measure(draw_apart(pipe, sets, first), sets)
    speed = train_panel_arm(pipe, TRAINED[name], steps, seed) if name in TRAINED else 0.0
    figures = measure(draw_sets(pipe, sets, first), sets) | {"images per second": speed}
    if name in ("in-context lora", "base canvas"):
        figures["given"] = given_agreement(draw_sets(pipe, sets, first, known=True), sets)
    return figures
