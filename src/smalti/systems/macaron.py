"""Macaron Net puts half of a block's feed-forward layer before attention and half of it behind.

Read as an ODE, attention is how tokens interact and the feed-forward layer what each does alone; a standard block
splits the two as Lie and Trotter do, a Macaron block as Strang does, at equal parameters and FLOPs. The claim: a
Macaron model guesses hidden characters of unseen emoji names and keywords better than a standard one of its size. What
the order does for a diffusion transformer is reported beside it.
"""

from dataclasses import replace
from functools import partial
from statistics import stdev
from typing import Any, Literal

import torch

from smalti.backbones.block_order import build_equal, count_parameters
from smalti.backbones.dit import DiT
from smalti.backbones.macaron import halving_ratio, to_macaron
from smalti.backbones.text_transformer import MaskedLanguageModel, TextShape
from smalti.core.protocols import Batch, Cond
from smalti.core.system import Check, System, Verdict
from smalti.data.words import VOCABULARY
from smalti.evaluation.arms import run_arms
from smalti.evaluation.timing import paired_ratio
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji_arm import CHANNELS, GRID, TEXT_WIDTH, stock, train_emoji_arm
from smalti.tasks.language import held_out_loss, masked_lines, train_language
from smalti.training.bare_step import bare_step
from smalti.training.config import TrainConfig

SYSTEM = System(
    slug="macaron",
    uses=(
        "backbones.macaron.to_macaron", "backbones.block.TransformerBlock", "backbones.block_order.build_equal",
        "backbones.text_transformer.MaskedLanguageModel", "backbones.dit.DiT", "nn.modulation.ModulationTable",
        "objectives.masked_tokens.MaskedTokens", "data.words.Lines", "tasks.language.train_language",
        "recipes.emoji_arm.train_emoji_arm",
    ),
    models=("emoji",),
    data=("emoji",),
)  # fmt: skip
BATCH = 32
TEXT_STEPS, TEXT_RATE, TEXT_SEEDS = 600, 3e-3, (0, 1, 2, 3, 4, 5, 6)
ENCODER: dict[str, Any] = {"width": 64, "depth": 6, "heads": 4}
LINE, HIDDEN = 48, 0.3
"""Most characters of a line, and the share of them that is guessed."""
FLOW_STEPS, FLOW_RATE = 250, 4e-3
DENOISER: dict[str, Any] = {"depth": 4, "heads": 3, "head_dim": 32}
ORDERS = ("standard", "macaron")


def small(ctx) -> Verdict:
    """Masked characters, then flow matching, each by standard and Macaron blocks of equal size; splitting orders."""
    stock()
    words = run_arms(
        "macaron", ORDERS, TEXT_SEEDS, ctx.scratch, {"steps": round(TEXT_STEPS * ctx.budget)},
        function="words_arm", say=ctx.say,
    )  # fmt: skip
    flows = run_arms(
        "macaron", ORDERS, ctx.seeds, ctx.scratch, {"steps": round(FLOW_STEPS * ctx.budget)},
        function="flow_arm", say=ctx.say,
    )  # fmt: skip
    main = words.compare("macaron", "standard", "loss")
    checks = [_card_rule("characters", words, "macaron", "standard")]
    checks += [
        Check(f"standard model, {kind}", words.mean("standard", kind)) for kind in ("converted", "converted, tuned")
    ]
    checks += [_card_rule("flow loss of a DiT with shared adaLN", flows, "macaron", "standard")]
    checks += [Check(f"flow loss, {order}", flows.mean(order, "loss")) for order in ORDERS]
    sizes = [arms.mean("macaron", "parameters") / arms.mean("standard", "parameters") for arms in (words, flows)]
    off = max(abs(size - 1) for size in sizes)
    checks.append(Check("parameters, largest relative difference", off, "< 0.003", off < 0.003))
    checks += _splitting()
    return Verdict(
        measured=f"masked characters of held-out emoji names and keywords after {round(TEXT_STEPS * ctx.budget)} steps",
        unit="nats",
        ours=main.ours,
        comparators={"standard": main.theirs},
        rule="ours < standard",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=TEXT_SEEDS,
        checks=tuple(checks),
        figures={"words": {arm: words.values(arm, "loss") for arm in ORDERS},
                 "flow": {arm: flows.values(arm, "loss") for arm in ORDERS}},
        notes="encoders of 6 x 64 with rotary positions, at the best of three rates for both orders (with sine or "
        "learned positions 600 steps are hardly a beginning and either order was ahead; 4 x 64 after 800 steps showed "
        "no difference); DiTs of 4 x 96 on 64 tokens; as Euler sub-steps, a network's, either splitting has order 1",
    )  # fmt: skip


def full(ctx) -> Verdict:
    """DiT-XL's width and depth: a forward pass and a training step with Macaron against standard blocks, compiled."""
    device, samples = ctx.device, 64
    cond = Cond(label=torch.randint(1000, (samples,), device=device))
    x, t = torch.randn(samples, 4, 32, 32, device=device), torch.full((samples,), 0.5, device=device)
    passes, steps = {}, {}
    for order in ORDERS:
        torch.manual_seed(0)
        with torch.device(device):
            trained, drawing = (DiT(depth=28, heads=16, head_dim=72, num_labels=1000, block_order=order) for _ in "12")
        drawing = drawing.eval().requires_grad_(False).bfloat16()
        for model in (trained, drawing):
            model.compile_repeated_blocks()
        passes[order] = partial(drawing, x, t, cond)
        batch = Batch(x, cond, torch.arange(samples))
        steps[order] = bare_step(trained.train(), FlowMatching(), batch, torch.bfloat16)
    ratio = paired_ratio(passes["macaron"], passes["standard"], repeats=20, warmup=5)
    step = paired_ratio(steps["macaron"], steps["standard"], repeats=10, warmup=3)
    return Verdict(
        measured=f"seconds of a forward pass of DiT-XL/2, {samples} samples of 256 tokens, bf16, blocks compiled",
        unit="s",
        ours=ratio.first,
        comparators={"standard": ratio.second},
        rule="ours < 1.05 * standard",
        outcome=ratio.outcome(1.05, below=True),
        interval=(ratio.low, ratio.high),
        checks=(Check("training step, ours over standard", step.median, "< 1.05", step.high < 1.05),),
        notes="random weights: time alone; the interval is of the ratio ours / standard",
    )


def words_arm(order: str, seed: int, steps: int, rate: float = TEXT_RATE) -> dict[str, float]:
    """Trains an encoder on masked characters; a standard one is turned into Macaron's afterwards, and trained on."""
    task, config = masked_lines(LINE, HIDDEN), _config(steps, rate, seed)
    torch.manual_seed(seed)
    model = train_language(task, words_model(order), config)
    figures = {"loss": held_out_loss(task, model), "parameters": float(count_parameters(model))}
    if order == "standard":
        converted = to_macaron(model)
        figures["converted"] = held_out_loss(task, converted)
        tuned = train_language(task, converted.train().requires_grad_(), _config(steps // 10, rate / 4, seed))
        figures["converted, tuned"] = held_out_loss(task, tuned)
    return figures


def words_model(order: str) -> MaskedLanguageModel:
    """The encoder of an arm: the feed-forward layers pay for the third norm and one more bias."""
    shape = TextShape(VOCABULARY, "rotary", **ENCODER)

    def build(ffn_ratio, order):
        return MaskedLanguageModel(replace(shape, ffn_ratio=ffn_ratio, order=order))

    return build_equal(build, shape.width, order)


def flow_arm(order: str, seed: int, steps: int, rate: float = FLOW_RATE) -> dict[str, float]:
    """Trains a DiT on cached latents."""
    torch.manual_seed(seed)
    model = flow_model(order)
    config = replace(_config(steps, rate, seed), eval_every=steps, eval_samples=698)
    trained = train_emoji_arm(model, config)
    return {"loss": trained.held_out_loss, "parameters": float(count_parameters(model))}


def flow_model(order: str, modulation: Literal["own", "shared"] = "shared") -> DiT:
    """The DiT of an arm: the feed-forward layers pay for what a larger adaLN takes, little if all blocks share it."""

    def build(ffn_ratio, order):
        return DiT(
            in_channels=CHANNELS, patch_size=1, num_labels=4, pooled_dim=TEXT_WIDTH, base_size=GRID[0],
            ffn_ratio=ffn_ratio, block_order=order, modulation=modulation, **DENOISER,
        )  # fmt: skip

    return build_equal(build, DENOISER["heads"] * DENOISER["head_dim"], order)


def _config(steps: int, rate: float, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, batch=BATCH, learning_rate=rate, warmup=min(50, steps // 5), decay="linear-cooldown", ema=0.99,
        seed=seed, save_every=steps,
    )  # fmt: skip


def _card_rule(name: str, arms, ours: str, theirs: str) -> Check:
    """The mean difference in units of its standard error; it must not be positive by more than one."""
    differences = [one - other for one, other in zip(arms.values(ours, "loss"), arms.values(theirs, "loss"))]
    mean, error = sum(differences) / len(differences), stdev(differences) / len(differences) ** 0.5
    return Check(
        f"{name}, ours less standard",
        f"{mean:+.4f} +- {error:.4f}, {mean / arms.mean(theirs, 'loss'):+.2%}",
        "not above 0 by more than one standard error",
        mean <= error,
    )


def _splitting() -> list[Check]:
    """By how much the error of the linear toy system falls when the step is halved."""
    checks = []
    for exact, flows in ((True, "exact sub-flows"), (False, "Euler sub-steps")):
        for order in ORDERS:
            ratio, expected = halving_ratio(order, exact), 4 if exact and order == "macaron" else 2
            holds = abs(ratio / expected - 1) < 0.1
            checks.append(
                Check(f"{order}, {flows}, error over that at half the step", ratio, f"{expected} +- 10 %", holds)
            )
    return checks
