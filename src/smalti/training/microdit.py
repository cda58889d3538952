"""MicroDiT's schedule: masked and unmasked at 256 px, then the same at 512 px.

    stage          ratio  steps    rate               average  ln(sigma): mean, std  clip
    256-masked     0.75   250,000  2.4e-4 to a tenth  none     -0.6, 1.2             0.25
    256-unmasked   0       30,000  8e-5               none     -0.6, 1.2             0.25
    512-masked     0.75    50,000  8e-5               0.99975   0.0, 0.6             0.5
    512-unmasked   0        5,000  8e-5               0.9975    0.0, 0.6             0.5

Larger pictures hide less under the same noise, so their noise levels lie higher. Adam's moments go on within a
resolution and begin afresh with the next one, after a warm-up. Sigma of the data is 0.9, the batch 2048, in bf16.

Source: arXiv 2407.15811, section 4.1 and appendix A (table 8).
"""

from dataclasses import dataclass
from typing import Literal

from smalti.objectives.edm import EDM
from smalti.ops.token_masks import RandomMask
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.stages import Stage

SIGMA_DATA = 0.9


@dataclass(frozen=True)
class Row:
    """One line of the table above; `large` is the higher resolution."""

    name: str
    large: bool
    ratio: float
    steps: int
    rate: float
    warmup: int
    decay: Literal["cosine", "constant"]
    average: float
    mean: float
    std: float
    clip: float


ROWS = (
    Row("256-masked", False, 0.75, 250_000, 2.4e-4, 2500, "cosine", 0.0, -0.6, 1.2, 0.25),
    Row("256-unmasked", False, 0.0, 30_000, 8e-5, 0, "constant", 0.0, -0.6, 1.2, 0.25),
    Row("512-masked", True, 0.75, 50_000, 8e-5, 500, "constant", 0.99975, 0.0, 0.6, 0.5),
    Row("512-unmasked", True, 0.0, 5_000, 8e-5, 0, "constant", 0.9975, 0.0, 0.6, 0.5),
)


def paper_stages(
    small: SampleSource,
    large: SampleSource,
    *,
    scale: float = 1.0,
    batch: int = 2048,
    accumulate: int = 1,
    patch_size: int = 2,
    sigma_data: float = SIGMA_DATA,
    seed: int = 0,
) -> list[Stage]:
    """The four stages for `train_stages`.

    Args:
        small: latents of 256 px.
        large: latents of 512 px.
        scale: factor on all steps.
        batch: samples a step.
        accumulate: parts of a process's share of the batch.
        patch_size: P of the model.
        sigma_data: standard deviation of the latents.
        seed: of the training.
    """
    stages = []
    for row in ROWS:
        steps = max(1, round(row.steps * scale))
        config = TrainConfig(
            steps=steps, batch=batch, learning_rate=row.rate, warmup=min(steps, round(row.warmup * scale)),
            decay=row.decay, weight_decay=0.1, betas=(0.9, 0.999), clip=row.clip, ema=row.average,
            accumulate=accumulate, precision="bf16", seed=seed,
        )  # fmt: skip
        objective = EDM(row.mean, row.std, sigma_data, RandomMask(row.ratio), patch_size)
        moments = "fresh" if row.name == "512-masked" else "kept"
        stages.append(Stage(row.name, objective, config, large if row.large else small, moments))
    return stages
