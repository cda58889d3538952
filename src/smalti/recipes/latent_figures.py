"""Everything that is measured of one trained flow on latents of digits: solver, guidance, tasks, bound."""

from collections.abc import Sequence

import torch

from smalti.core.seeds import generators_for
from smalti.data.digits import load_digits
from smalti.evaluation.digit_metrics import class_spread, digit_report
from smalti.evaluation.latent_bound import bound_report
from smalti.evaluation.vgg import VGG16
from smalti.recipes.digit_latents import decode_digits, digit_autoencoder, digit_latents, encoded_digits
from smalti.recipes.latent_arm import FLOW, LatentArm, held_out_rows
from smalti.recipes.latent_tasks import drawing_maps, inpainting
from smalti.sampling.dopri5 import Dopri5
from smalti.training.config import TrainConfig

FINE, COMPARED, GUIDED = 200, 160, 500
"""Steps of Euler that dopri5 is compared with, on so many digits; digits drawn with guidance."""
TOLERANCES = ("1e-3", "1e-5")


def flow_figures(arm: LatentArm, tuning: TrainConfig, scales: Sequence[float]) -> dict[str, float]:
    """Figures by name.

    Args:
        arm: trained by flow matching.
        tuning: how it goes on to the tasks.
        scales: of guidance.
    """
    return solver_figures(arm) | guidance_figures(arm, scales) | task_figures(arm, tuning) | bound_figures(arm)


def solver_figures(arm: LatentArm) -> dict[str, float]:
    """Dopri5 at two tolerances beside many steps of Euler."""
    rows, figures = held_out_rows(COMPARED), {}
    fine = arm.draw(FINE, count=COMPARED).latents
    for tolerance in TOLERANCES:
        drawn = arm.draw(solver=Dopri5(float(tolerance), float(tolerance)), count=COMPARED)
        figures |= {
            f"calls, dopri5 {tolerance}": drawn.calls,
            f"RMSE, dopri5 {tolerance}": float((drawn.latents - fine).square().mean().sqrt()),
            f"FD, dopri5 {tolerance}": digit_report(decode_digits(drawn.latents), rows).distance,
        }
    return figures


def guidance_figures(arm: LatentArm, scales: Sequence[float]) -> dict[str, float]:
    """What guidance gives to accuracy and takes from variety."""
    figures, rows = {}, held_out_rows(GUIDED)
    for scale in scales:
        pixels = decode_digits(arm.draw(guidance=scale, count=GUIDED).latents)
        figures[f"accuracy, guidance {scale:g}"] = digit_report(pixels, rows).accuracy
        figures[f"spread of a class, guidance {scale:g}"] = class_spread(pixels, load_digits("held-out").labels[rows])
    return figures


def task_figures(arm: LatentArm, tuning: TrainConfig) -> dict[str, float]:
    """Inpainting beside a paste, and maps beside shuffled ones."""
    filled, maps = inpainting(arm, tuning, network=VGG16.pretrained()), drawing_maps(arm, tuning)
    trained, pasted = filled.trained._asdict(), filled.pasted._asdict()
    return trained | {f"{key}, pasted": value for key, value in pasted.items()} | {
        "accuracy, filled": filled.trained_accuracy, "accuracy, filled, pasted": filled.pasted_accuracy,
        "mIoU": maps.fitting, "mIoU, shuffled": maps.shuffled,
    }  # fmt: skip


def bound_figures(arm: LatentArm, count: int = 256) -> dict[str, float]:
    """Both parts of the bound on the first held-out digits."""
    source, rows = digit_latents("held-out"), torch.arange(min(count, len(load_digits("held-out"))))
    batch = source.batch(rows, generators_for(rows.tolist()))
    pixels = encoded_digits("held-out").pictures.pixels(rows.tolist())
    bound = bound_report(digit_autoencoder(), arm.model, pixels, batch, FLOW.floor)
    return {
        "reconstruction": bound.reconstruction, "matching": bound.matching, "bound": bound.decades,
        "decoder gain": bound.decoder_gain, "field gain": bound.field_gain,
    }  # fmt: skip
