"""RAE paints pictures from what a frozen vision encoder sees in them, and lets a diffusion transformer work in there.

Such latents have many channels: the denoiser needs a head that is at least as wide, times move towards noise, and the
decoder learns from latents that are not clean. The claim: a narrow transformer cannot even learn one picture by heart,
and the same one with a wide head can. Beside it stand the decoder's training on noise, and pictures drawn with and
without the head and the shift, and on latents of an ordinary autoencoder with as many tokens.
"""

from typing import Any

import torch

from smalti.backbones.block_order import count_parameters
from smalti.backbones.dit_dh import DiTDH
from smalti.backbones.lightning_dit import LightningDiT
from smalti.core.protocols import Batch, Cond
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.arms import run_arms
from smalti.evaluation.latent_costs import decoder_gflops, denoiser_gflops, denoisers
from smalti.evaluation.timing import paired_ratio
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.time_sampling import dimension_shift
from smalti.recipes.emoji_arm import CHANNELS as VAE_CHANNELS
from smalti.recipes.emoji_arm import TEXT_WIDTH, stock, train_emoji_arm
from smalti.recipes.rae_arm import CHANNELS, GRID, SHIFT, latent_probes, overfit_loss, painted, rae_stock
from smalti.training.bare_step import bare_step
from smalti.training.config import TrainConfig

SYSTEM = System(
    slug="rae",
    uses=(
        "tokenizers.rae.RAE", "tokenizers.representation_encoder.RepresentationEncoder", "nn.vit_decoder.ViTDecoder",
        "tokenizers.latent_statistics.element_moments", "training.tokenizer.fit_tokenizer",
        "training.feature_critic.FeatureCritic", "ops.diff_augment.diff_augment", "backbones.dit_dh.DiTDH",
        "backbones.lightning_dit.LightningDiT", "objectives.time_sampling.dimension_shift",
        "sampling.guidance.Autoguidance", "recipes.rae_arm.overfit_loss",
        "evaluation.reconstruction.reconstruction_report",
    ),
    models=("rae-emoji", "vit-self", "emoji"),
    data=("emoji",),
)  # fmt: skip
WIDTH, HEAD, DEPTH = 64, 256, 4
FITS, DRAWS = ("head", "narrow", "wide"), ("rae", "no shift", "no head", "vae")
PAINTS = {"tau 0.8": 0.8, "tau 0": 0.0}
FIT_STEPS, PAINT_STEPS, DRAW_STEPS = 300, 200, 200


def small(ctx) -> Verdict:
    """One picture learned by heart, decoders with and without noise, and pictures drawn by four arms."""
    stock()
    rae_stock()

    def run(names, seeds, steps, function):
        steps = {"steps": round(steps * ctx.budget)}
        return run_arms("rae", list(names), seeds, ctx.scratch, steps, function=function, say=ctx.say)

    fits = run(FITS, ctx.seeds, FIT_STEPS, "fit")
    paints = run(PAINTS, ctx.seeds[:1], PAINT_STEPS, "paint")
    draws = run(DRAWS, ctx.seeds[:1], DRAW_STEPS, "draw")
    main = fits.compare("head", "narrow", "loss", 0.25)
    floor, losses, noisy = 1 - WIDTH / CHANNELS, fits.means("loss"), paints.means("noisy")
    clean = paints.means("clean")
    distances, probes = draws.means("distance"), latent_probes()
    cost, decoders = denoiser_gflops(), decoder_gflops()
    head, wide = cost["head"] / cost["DiT-XL"], cost["wide"] / cost["head"]
    decoding = decoders["ViT-XL"] / decoders["SD-VAE"]
    return Verdict(
        measured=f"flow-matching loss on the one picture that was seen, after {round(FIT_STEPS * ctx.budget)} steps",
        unit="squared error",
        ours=main.ours,
        comparators={name: value for name, value in losses.items() if name != "head"},
        rule="ours < 0.25 * narrow",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=ctx.seeds,
        checks=(
            Check(f"what a width of {WIDTH} cannot pass of {CHANNELS} channels", floor),
            Check("narrow, over that floor", losses["narrow"] / floor, "> 0.95", losses["narrow"] > 0.95 * floor),
            Check("all blocks wide", losses["wide"], "< 0.25 * narrow", losses["wide"] < 0.25 * losses["narrow"]),
            Check(
                "PSNR at noise 0.3, tau 0.8 less tau 0", noisy["tau 0.8"] - noisy["tau 0"], "> 0",
                noisy["tau 0.8"] > noisy["tau 0"],
            ),
            Check("PSNR of clean latents, tau 0.8 less tau 0", clean["tau 0.8"] - clean["tau 0"]),
            *(
                Check(f"FD-EfficientNetLite0, {name}", distances[name], "> rae", distances[name] > distances["rae"])
                for name in DRAWS[1:]
            ),
            Check("FD-EfficientNetLite0, rae", distances["rae"]),
            Check("linear probe of latents, RAE", probes["rae"], "> vae + 0.05", probes["rae"] > probes["vae"] + 0.05),
            Check("linear probe of latents, autoencoder", probes["vae"]),
            Check("FLOPs at the paper's size, head over none", head, "< 1.5", head < 1.5),
            Check("FLOPs at the paper's size, wide over head", wide, "> 2", wide > 2),
            Check("FLOPs of decoding 256 px, ViT-XL over SD-VAE", decoding, "< 0.5", decoding < 0.5),
        ),
        figures={
            name: {key: arms.values(name, key) for key in arms.figures[name][0]}
            for arms in (fits, paints, draws) for name in arms.figures
        },
        tried=("seed 0, 500 steps, alone: head 0.0081, narrow 0.7398",),
        notes=f"deep part {DEPTH} x {WIDTH}, head 2 x {HEAD}; {GRID * GRID} tokens; shift {SHIFT:.3f}; FD of one seed",
    )  # fmt: skip


def full(ctx) -> Verdict:
    """DiT^DH-XL on 256 tokens of 768 channels beside DiT-XL and one that is wide throughout: a training step's time."""
    device, samples = ctx.device, 128 if torch.cuda.mem_get_info()[1] > 100 * 2**30 else 64
    with torch.device(device):
        torch.manual_seed(0)
        models = denoisers()
        cond = Cond(label=torch.randint(1000, (samples,)))
        batch = Batch(torch.randn(samples, 768, 16, 16), cond, torch.arange(samples))
    objective = FlowMatching(shift=dimension_shift((768, 16, 16)))
    steps = {}
    for name, model in models.items():
        model.enable_gradient_checkpointing()
        steps[name] = bare_step(model.train(), objective, batch, torch.bfloat16)
    wide, plain = (paired_ratio(steps["head"], steps[name], repeats=10, warmup=3) for name in ("wide", "DiT-XL"))
    return Verdict(
        measured=f"seconds of a training step of DiT^DH-XL on 256 tokens of 768 channels, {samples} samples, bf16",
        unit="s",
        ours=wide.first,
        comparators={"all blocks of width 2048": wide.second, "DiT-XL": plain.second},
        rule="ours < 0.5 * all blocks of width 2048",
        outcome=wide.outcome(0.5, below=True),
        interval=(wide.low, wide.high),
        checks=(Check("over DiT-XL", plain.median, "< 1.5", plain.high < 1.5),),
        figures={"parameters": {name: count_parameters(model) for name, model in models.items()}},
        notes="random weights, recomputed activations: time alone; the interval is of the ratio ours / wide",
    )


def fit(name: str, seed: int, steps: int) -> dict[str, float]:
    """Learns one picture by heart."""
    return {"loss": overfit_loss(denoiser(name, seed, pooled_dim=0, num_labels=0), seed, steps)}


def paint(name: str, seed: int, steps: int) -> dict[str, float]:
    """Trains a decoder."""
    return painted(PAINTS[name], seed, steps)._asdict()


def draw(name: str, seed: int, steps: int) -> dict[str, float]:
    """Trains a denoiser and measures its pictures."""
    shared = stock() if name == "vae" else rae_stock()
    shift = 1.0 if name in ("vae", "no shift") else SHIFT
    config = TrainConfig(
        steps=steps, batch=32, learning_rate=2e-3, warmup=steps // 5, decay="linear-cooldown", ema=0.98, seed=seed,
        eval_every=steps, eval_samples=128,
    )  # fmt: skip
    trained = train_emoji_arm(
        denoiser(name, seed, TEXT_WIDTH, 4), config, objective=FlowMatching(shift=shift), shared=shared,
        source=shared.train, shift=shift,
    )  # fmt: skip
    return {"distance": trained.distance(count=200), "images per second": trained.images_per_second}


def denoiser(name: str, seed: int, pooled_dim: int, num_labels: int) -> DiTDH | LightningDiT:
    """The denoiser of an arm: a head unless the arm has none, or is wide throughout."""
    torch.manual_seed(seed)
    shared: Any = {
        "in_channels": VAE_CHANNELS if name == "vae" else CHANNELS, "patch_size": 1, "base_size": GRID,
        "pooled_dim": pooled_dim, "num_labels": num_labels,
    }  # fmt: skip
    if name in ("narrow", "wide", "no head"):
        width = HEAD if name == "wide" else WIDTH
        return LightningDiT(depth=DEPTH, heads=width // 32, head_dim=32, is_fourier=True, **shared)
    return DiTDH(width=(WIDTH, HEAD), depth=(DEPTH, 2), heads=(WIDTH // 32, HEAD // 32), **shared)
