"""LFM learns straight flows between noise and the latents of an autoencoder, and takes conditions at its input.

One network gives the velocity; an adaptive solver or few steps of a fixed one integrate it, guidance acts on it, and
masked pictures or semantic maps come as further channels of a model that was trained without them. The claim: with few
calls pictures come out closer to real ones than those of the same transformer trained to predict noise (DDPM), with
equal data and steps.
"""

from itertools import pairwise

import torch

from smalti.backbones.dit import DiT
from smalti.core.protocols import Cond
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.arms import run_arms
from smalti.evaluation.digit_metrics import METRIC, digit_report, load_classifier
from smalti.evaluation.digit_segmenter import load_segmenter
from smalti.evaluation.timing import median_seconds, paired_ratio
from smalti.objectives.beta_process import BetaProcess
from smalti.objectives.ddpm import DDPM
from smalti.recipes.digit_latents import decode_digits, digit_latents
from smalti.recipes.latent_arm import FLOW, held_out_rows, train_latent_arm
from smalti.recipes.latent_figures import flow_figures
from smalti.sampling.dopri5 import Dopri5, effort
from smalti.sampling.loop import sample
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import Euler
from smalti.training.config import TrainConfig

SYSTEM = System(
    slug="lfm",
    uses=(
        "objectives.flow_matching.FlowMatching", "objectives.reversed_time.ReversedTime", "sampling.dopri5.Dopri5",
        "sampling.solvers.Midpoint", "sampling.guidance.Guidance", "training.encoded_source.EncodedSource",
        "training.inpaint_source.InpaintSource", "data.masks.draw_masks", "nn.widen.widen",
        "control.channel_concat.ChannelConcat", "sampling.keep_known.KeepKnown", "data.digit_maps.digit_maps",
        "evaluation.inpainting.inpaint_report", "evaluation.segmentation.map_report",
        "evaluation.latent_bound.bound_report", "objectives.ddpm.DDPM", "sampling.ddim.sample_ddim",
        "recipes.latent_arm.train_latent_arm", "recipes.latent_tasks.inpainting", "recipes.latent_figures.flow_figures",
        "recipes.digit_latents.digit_latents",
    ),
    data=("digits",),
)  # fmt: skip
ARMS = {"flow": FLOW, "ddpm": DDPM(BetaProcess("linear"))}
RATES = {"flow": 8e-3, "ddpm": 8e-3}
"""The best of three for each, on another seed."""
CALLS, FEW, SCALES = (2, 5, 10, 20, 50), 10, (1.0, 2.0, 4.0)
STEPS, DRAWN = 1000, 500
RMSE = "RMSE, dopri5 1e-5"


def small(ctx) -> Verdict:
    """Two arms of a micro DiT on latents of digits; the solver, guidance and both tasks on the first seed's flow."""
    stock()
    steps, first = round(STEPS * ctx.budget), ctx.seeds[0]
    settings = {"steps": steps, "whole": first}
    arms = run_arms("lfm", list(ARMS), ctx.seeds, ctx.scratch, settings, say=ctx.say)
    main = arms.compare("flow", "ddpm", f"FD at {FEW}", 0.8)
    one = arms.figures["flow"][0]
    lower = [calls for calls in CALLS if arms.mean("flow", f"FD at {calls}") < arms.mean("ddpm", f"FD at {calls}")]
    curves = {name: {calls: arms.values(name, f"FD at {calls}") for calls in CALLS} for name in ARMS}
    change = abs(one["FD, dopri5 1e-3"] / one["FD, dopri5 1e-5"] - 1)

    def grow(figure: str, sign: int) -> Check:
        values = [one[f"{figure}, guidance {scale:g}"] for scale in SCALES]
        holds = all(sign * (b - a) > 0 for a, b in pairwise(values))
        shown = ", ".join(f"{value:.4g}" for value in values)
        return Check(f"{figure} at guidance 1, 2, 4", shown, "rising" if sign > 0 else "falling", holds)

    def below(name: str, ours: str, theirs: str, factor: float = 1.0, rule: str = "") -> Check:
        return Check(f"{name}, over {theirs}", one[ours] / one[theirs], rule or "< 1", one[ours] < factor * one[theirs])

    return Verdict(
        measured=f"{METRIC} of {DRAWN} held-out classes at {FEW} calls, after {steps} steps of 64",
        unit="FD",
        ours=main.ours,
        comparators={"ddpm": main.theirs},
        rule="ours < 0.8 * ddpm",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=ctx.seeds,
        checks=(
            Check("below ddpm at calls", ", ".join(map(str, lower)), "2 to 20", set(lower) >= {2, 5, 10, 20}),
            Check("latent RMSE of dopri5 to Euler-200", one[RMSE], "< 0.01", one[RMSE] < 0.01),
            Check("calls of dopri5 at 1e-5", one["calls, dopri5 1e-5"]),
            below("calls at 1e-3", "calls, dopri5 1e-3", "calls, dopri5 1e-5"),
            Check("change of FD from 1e-5 to 1e-3", change, "< 0.03", change < 0.03),
            grow("accuracy", 1),
            grow("spread of a class", -1),
            below("hidden error of inpainting", "inside", "inside, pasted"),
            below("VGG distance of inpainting", "perceptual", "perceptual, pasted"),
            Check("hidden PSNR, and of the pasted", f"{one['psnr']:.4g}, {one['psnr, pasted']:.4g}"),
            Check("error outside of the mask", one["outside"], "0", one["outside"] == 0),
            Check("filled digits that are read right", one["accuracy, filled"]),
            Check("mIoU of maps", one["mIoU"], "> 2 * shuffled", one["mIoU"] > 2 * one["mIoU, shuffled"]),
            Check("mIoU of shuffled maps", one["mIoU, shuffled"]),
            Check("reconstruction error of a picture", one["reconstruction"]),
            Check("matching error of a sample of latents", one["matching"]),
            Check("log10 of the bound", one["bound"]),
        ),
        figures={"FD by calls": curves, "first seed": one},
        notes="DiT 6 x 96 on 16 tokens; Euler with times shifted by 2, DDIM from the noisiest timestep; linear betas",
        tried=(
            "seed 100, 300 steps, FD of 1000 at 10 calls, rates 2e-3, 4e-3, 8e-3: flow 377, 297, 228; ddpm 482, "
            "440, 441; ddpm with cosine betas at 4e-3: 864",
        ),
    )  # fmt: skip


def full(ctx) -> Verdict:
    """DiT-L/2 on latents of 256 px, random weights: what choosing the steps costs beside fixed ones."""
    device, samples = ctx.device, 64
    torch.manual_seed(0)
    with torch.device(device):
        model = DiT(in_channels=4, patch_size=2, depth=24, heads=16, head_dim=64, num_labels=1000, base_size=16).eval()
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)  # it begins at zero, and zero is integrated in one step
        noise, label = torch.randn(samples, 4, 32, 32), torch.randint(1000, (samples,))
    model.compile_repeated_blocks()

    @torch.no_grad()
    def draw(solver, steps: int = 1):
        with torch.autocast(device.type, torch.bfloat16):
            return sample(model, noise, uniform_schedule(steps), solver, cond=Cond(label=label), progress=False)

    adaptive = Dopri5(1e-3, 1e-3, min_step=0.02)  # coarse rounding never meets a tight tolerance
    found = effort(draw(adaptive))
    calls = int(found.calls[0])
    ratio = paired_ratio(lambda: draw(adaptive), lambda: draw(Euler(), calls), repeats=10, warmup=3)
    took = {steps: median_seconds(lambda steps=steps: draw(Euler(), steps), repeats=10, warmup=3) for steps in (25, 50)}
    speeds = {f"euler {steps}": samples / one for steps, one in took.items()} | {"dopri5": samples / ratio.first}
    return Verdict(
        measured=f"seconds of a run of DiT-L/2 by dopri5, {samples} samples, bf16, blocks compiled",
        unit="s",
        ours=ratio.first,
        comparators={"Euler with as many calls": ratio.second},
        rule="ours < 1.05 * Euler with as many calls",
        outcome=ratio.outcome(1.05, below=True),
        interval=(ratio.low, ratio.high),
        checks=(
            Check("calls", calls),
            Check("trials rejected", int(found.rejected[0])),
            Check("trials of the smallest size", int(found.forced[0])),
        ),
        figures={"images per second": speeds},
        notes="random weights: time alone, the interval is of the ratio; the paper tells of 85 to 90 calls at 1e-5",
    )


def stock() -> None:
    """Makes or opens what all arms share."""
    for split in ("train", "held-out"):
        digit_latents(split)
    load_classifier()
    load_segmenter()


def settings(steps: int, rate: float, seed: int) -> TrainConfig:
    """Of any training."""
    return TrainConfig(
        steps=steps, batch=64, learning_rate=rate, warmup=min(50, steps), decay="linear-cooldown", ema=0.99, seed=seed,
        eval_every=steps, eval_samples=1000,
    )  # fmt: skip


def arm(name: str, seed: int, steps: int, whole: int) -> dict[str, float]:
    """Trains one arm and measures it; the flow of seed `whole` in every way."""
    trained = train_latent_arm(ARMS[name], settings(steps, RATES[name], seed))
    figures = {"held-out loss": trained.held_out_loss, "images per second": trained.images_per_second}
    rows = held_out_rows(DRAWN)
    for calls in CALLS:
        report = digit_report(decode_digits(trained.draw(calls, count=len(rows)).latents), rows)
        figures |= {f"FD at {calls}": report.distance, f"accuracy at {calls}": report.accuracy}
    if name == "flow" and seed == whole:
        figures |= flow_figures(trained, settings(max(1, steps // 3), RATES[name] / 2, seed), SCALES)
    return figures
