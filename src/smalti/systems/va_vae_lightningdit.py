"""VA-VAE aligns the latents of an autoencoder with a vision model, so that many channels stay easy to draw in.

More channels keep pictures better and are harder to learn to draw in; latents that a frozen vision model recognises
are not. LightningDiT is the denoiser that goes with it, a DiT with the parts of today. The claim: of two autoencoders
of 64 channels the aligned one keeps pictures as well, and the same small denoiser with the same steps draws closer to
real ones in its latents; a random teacher does not help as much.
"""

from pathlib import Path
from typing import Any

import torch

from smalti.backbones.dit import DiT
from smalti.backbones.lightning_dit import LightningDiT
from smalti.core.protocols import Cond
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.arms import run_arms
from smalti.evaluation.timing import paired_ratio
from smalti.recipes.emoji_arm import feature_tables, stock
from smalti.recipes.vae_arm import DRAWN, Rung, VAEArm, autoencoder, judge, shelf, train_on
from smalti.zoo.loader import load_model

SYSTEM = System(
    slug="va-vae-lightningdit",
    uses=(
        "training.va_vae_lightningdit.VFLoss", "training.tokenizer.fit_tokenizer",
        "training.latent_extraction.measure_channels", "tokenizers.conv_autoencoder.ConvAutoencoder",
        "backbones.lightning_dit.LightningDiT", "objectives.cosine_velocity.CosineFlowMatching",
        "sampling.guidance.Guidance", "sampling.dopri5.Dopri5", "evaluation.reconstruction.reconstruction_report",
        "evaluation.uniformity.latent_uniformity", "recipes.vae_arm.train_on",
    ),
    models=("emoji", "vit-caption"),
    data=("emoji",),
)  # fmt: skip
SLUG = SYSTEM.slug
ARMS = {
    "few channels": VAEArm(16),
    "many channels": VAEArm(64),
    "aligned": VAEArm(64, "vit-caption"),
    "random teacher": VAEArm(64, "random"),
}
LADDER = {
    "DiT": Rung((), logit_normal=False, cosine=0.0),
    "+ logit-normal": Rung((), cosine=0.0),
    "+ direction": Rung(()),
    "+ SwiGLU": Rung(("has_swiglu",)),
    "+ RMS norms": Rung(("has_swiglu", "has_rms_norm")),
    "+ rotary positions": Rung(),
}
VAE_STEPS, STEPS, LADDER_STEPS, LIMIT = 1000, 320, 200, 0.85


def small(ctx) -> Verdict:
    """Four autoencoders, the same denoiser on each of them, and the ladder of its parts on the latents of `emoji`."""
    stock()
    for teacher in ("vit-caption", "random"):
        feature_tables(teacher)
    settings = {"vae_steps": round(VAE_STEPS * ctx.budget), "folder": str(shelf(ctx.scratch, SLUG))}
    names, scratch, say = list(ARMS), ctx.scratch, ctx.say
    kept = run_arms(SLUG, names, ctx.seeds[:1], scratch, settings, function="keep", say=say)
    settings["steps"] = round(STEPS * ctx.budget)
    arms = run_arms(SLUG, names, ctx.seeds, scratch, settings, say=say)
    steps = {"steps": round(LADDER_STEPS * ctx.budget)}
    ladder = run_arms(SLUG, list(LADDER), ctx.seeds[:1], scratch, steps, function="rung", say=say)
    main = arms.compare("aligned", "many channels", "distance", LIMIT)
    control = arms.compare("random teacher", "many channels", "distance", LIMIT)
    distances, psnr = arms.means("distance"), kept.means("PSNR")
    lost = psnr["many channels"] - psnr["aligned"]
    dilemma = distances["many channels"] / distances["few channels"]
    uneven = kept.means("density variation")
    rungs = ladder.means("distance")
    return Verdict(
        measured=f"FD-EfficientNetLite0 of {DRAWN} held-out captions after {settings['steps']} steps of 32",
        unit="FD",
        ours=main.ours,
        comparators={name: value for name, value in distances.items() if name != "aligned"},
        rule=f"ours < {LIMIT:g} * many channels",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=ctx.seeds,
        checks=(
            Check("PSNR lost by alignment, dB", lost, "<= 0.5", lost <= 0.5),
            Check("PSNR, dB", ", ".join(f"{name} {value:.2f}" for name, value in psnr.items())),
            Check("the dilemma: many over few channels, FD", dilemma, "> 1", dilemma > 1),
            Check("random teacher", control.ours, f"not below {LIMIT:g} * many channels", control.outcome != "holds"),
            Check("unevenness of the latents, aligned over many channels", uneven["aligned"] / uneven["many channels"]),
            Check("ladder, FD", ", ".join(f"{name} {value:.0f}" for name, value in rungs.items())),
        ),
        figures={
            "autoencoders": {name: dict(some[0]) for name, some in kept.figures.items()},
            "denoisers": {name: arms.values(name, "distance") for name in names},
        },
        notes="autoencoders of 8 x 8 latents without VGG distance and critic, one training each; seeds of the denoiser",
    )


def full(ctx) -> Verdict:
    """LightningDiT-XL/1 beside DiT-XL/1 on 256 tokens: a forward, bf16, blocks compiled."""
    device, samples = ctx.device, 32
    torch.manual_seed(0)
    with torch.device(device):
        shape: dict[str, Any] = {
            "in_channels": 32,
            "patch_size": 1,
            "depth": 28,
            "heads": 16,
            "head_dim": 72,
            "num_labels": 1000,
        }
        lightning, plain = LightningDiT(**shape).eval(), DiT(**shape, base_size=16).eval()
        x, t, cond = torch.randn(samples, 32, 16, 16), torch.rand(samples), Cond(label=torch.arange(samples))
    for model in (lightning, plain):
        model.compile_repeated_blocks()

    def call(model):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return model(x, t, cond)

    ratio = paired_ratio(lambda: call(lightning), lambda: call(plain), repeats=10, warmup=3)
    return Verdict(
        measured=f"seconds of a forward of LightningDiT-XL/1, {samples} samples, 256 tokens, bf16, blocks compiled",
        unit="s",
        ours=ratio.first,
        comparators={"DiT-XL/1": ratio.second},
        rule="ours < 1.15 * DiT-XL/1",
        outcome=ratio.outcome(1.15, below=True),
        interval=(ratio.low, ratio.high),
        notes="random weights: time alone; the interval is of the ratio ours / DiT-XL/1",
    )


def keep(name: str, seed: int, vae_steps: int, folder: str) -> dict[str, float]:
    """Trains one autoencoder, keeps it, and measures it."""
    return judge(autoencoder(name, ARMS[name], vae_steps, Path(folder)))


def arm(name: str, seed: int, vae_steps: int, folder: str, steps: int) -> dict[str, float]:
    """Trains the denoiser on the latents of one autoencoder."""
    trained = train_on(autoencoder(name, ARMS[name], vae_steps, Path(folder)), Rung(), steps, seed)
    return {"distance": trained.distance(guidance=1.0), "images per second": trained.images_per_second}


def rung(name: str, seed: int, steps: int) -> dict[str, float]:
    """Trains one rung of the ladder on the latents of the shipped autoencoder."""
    trained = train_on(load_model("emoji").autoencoder, LADDER[name], steps, seed)
    return {"distance": trained.distance(guidance=1.0), "held-out loss": trained.held_out_loss}
