"""One arm of a claim on latents of digits: a small denoiser by flow matching or by DDPM, and how well it draws.

What differs between arms is the objective; model, data, steps and seeds are the same. A trained arm may go on with
further channels at its input (see `latent_tasks`).
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smalti.backbones.dit import DiT
from smalti.control.channel_concat import ChannelConcat, ChannelCondition
from smalti.core.protocols import Cond, Objective
from smalti.core.seeds import generators_for, randn
from smalti.data.digits import CLASSES, load_digits
from smalti.objectives.beta_process import BetaProcess
from smalti.objectives.ddpm import DDPM, EpsDenoiser
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.time_sampling import Uniform
from smalti.recipes.digit_latents import CHANNELS, GRID, digit_latents
from smalti.sampling.ddim import sample_ddim
from smalti.sampling.dopri5 import Dopri5, effort
from smalti.sampling.guidance import Guidance
from smalti.sampling.keep_known import KeepKnown
from smalti.sampling.loop import sample
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import Euler
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.inpaint_source import EDIT_MASK, MASKED
from smalti.training.trainer import Trainer

FLOOR, SHIFT, BATCH = 1e-5, 2.0, 250
FLOW = FlowMatching(Uniform(), floor=FLOOR)
PATCH, WIDTH, DEPTH = 2, 96, 6


class Drawn(NamedTuple):
    """Latents (N, 4, 8, 8), and calls of the model a batch of them took on average."""

    latents: Tensor
    calls: float


@dataclass(frozen=True)
class LatentArm:
    """What a training ended with.

    Args:
        model: the averaged denoiser, `(x, t, cond) -> velocity` whatever it learned.
        process: of DDPM, else None.
        held_out_loss: the objective on held-out digits.
        images_per_second: of the training.
    """

    model: nn.Module
    process: BetaProcess | None
    held_out_loss: float
    images_per_second: float

    @torch.no_grad()
    def draw(
        self,
        steps: int = 20,
        *,
        solver: Dopri5 | None = None,
        guidance: float = 1.0,
        count: int | None = None,
        labels: Tensor | None = None,
        extra: Mapping[str, Tensor] | None = None,
        keeps: bool = False,
    ) -> Drawn:
        """Latents for the classes of the first held-out digits, evenly spaced; the seed of each is its index.

        Args:
            steps: of Euler, or of DDIM for a model of DDPM.
            solver: in place of Euler.
            guidance: scale on the velocity.
            count: of digits; None = all.
            labels: their classes (N,); None = the true ones.
            extra: conditions of these digits, in their order.
            keeps: the given part of `extra` is put back after each step, for a model that cannot read it.
        """
        rows, parts, calls = held_out_rows(count), [], []
        labels = load_digits("held-out").labels[rows] if labels is None else labels
        extra = extra or {}
        for some in torch.arange(len(rows)).split(BATCH):
            given = {name: value[some] for name, value in extra.items()}
            noise = randn((len(some), CHANNELS, GRID, GRID), generators_for(rows[some].tolist()))
            cond = Cond(label=labels[some], extra={} if keeps else given)
            settings: dict[str, Any] = {
                "cond": cond, "uncond": replace(cond, label=torch.full_like(some, CLASSES)), "progress": False
            }  # fmt: skip
            if self.process is not None:
                parts.append(sample_ddim(self.model, noise, self.process, steps, guidance=guidance, **settings))
                calls.append(float(steps))
                continue
            callback = KeepKnown(given[MASKED], noise, given[EDIT_MASK]) if keeps else None
            schedule = uniform_schedule(steps, SHIFT) if solver is None else [1.0, 0.0]
            state = sample(
                self.model, noise, schedule, solver or Euler(), guidance=Guidance(guidance), callback=callback,
                **settings,
            )  # fmt: skip
            parts.append(state.x)
            calls.append(float(steps) if solver is None else float(effort(state).calls[0]))
        return Drawn(torch.cat(parts), sum(calls) / len(calls))


def held_out_rows(count: int | None = None) -> Tensor:
    """Which held-out digits are drawn (N,): so many, evenly spaced; None = all."""
    total = len(load_digits("held-out"))
    count = total if count is None else count
    return torch.arange(count) * total // count


def train_latent_arm(
    objective: Objective,
    config: TrainConfig,
    *,
    start: LatentArm | None = None,
    conditions: Sequence[ChannelCondition] = (),
    sources: tuple[SampleSource, SampleSource] | None = None,
) -> LatentArm:
    """Trains a DiT of the latents' shape.

    Args:
        objective: flow matching or `DDPM`.
        config: steps, batch, rates and seed; `eval_every` has to be set.
        start: an arm whose copy goes on; None = a new model.
        conditions: further channels at its input.
        sources: training and held-out samples; None = the digits with their classes.
    """
    if start is None:
        torch.manual_seed(config.seed)
        model: nn.Module = DiT(
            in_channels=CHANNELS, patch_size=PATCH, depth=DEPTH, heads=WIDTH // 32, head_dim=32, num_labels=CLASSES,
            base_size=GRID // PATCH,
        )  # fmt: skip
    else:
        model = copy.deepcopy(start.model).requires_grad_(True)
    if conditions:
        model = ChannelConcat(model, conditions)
    train, held_out = sources or (digit_latents("train"), digit_latents("held-out"))
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        trainer = Trainer(model, objective, train, config, Path(folder), held_out=held_out)
        report = trainer.fit()
    assert report.held_out_loss is not None, "eval_every is 0: an arm is measured on held-out digits"
    process = objective.process if isinstance(objective, DDPM) else None
    averaged = trainer.ema_model.eval()
    denoiser = averaged if process is None else EpsDenoiser(averaged, process)
    return LatentArm(denoiser, process, report.held_out_loss, report.images_per_second)
