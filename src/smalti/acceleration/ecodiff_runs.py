"""Sampling runs of one model, which can be repeated: with masks or without, from the same noise and conditions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.core.errors import Refusal
from smalti.core.protocols import Cond, Denoiser, TensorBundle
from smalti.core.seeds import derive_seed, generators_for, randn
from smalti.sampling.conditions import Label, expand_request, label_conditions, text_conditions
from smalti.sampling.guidance import Guidance
from smalti.sampling.loop import SampleStep, sample
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import solver_for
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import LoopSolver


@dataclass(frozen=True)
class Starts(TensorBundle):
    """What pictures begin with: noise (B, ...), conditions, and a seed (B,) long for the noise of the steps."""

    noise: Tensor
    cond: Cond
    uncond: Cond | None
    seeds: Tensor


@dataclass(frozen=True)
class Runs:
    """Sampling runs of one model.

    Args:
        denoiser: `(x, t, cond) -> velocity`; calls the model whose units are masked.
        starts: of all pictures.
        schedule, solver, guidance: how they are drawn; no guidance is the conditional branch alone.
    """

    denoiser: Denoiser
    starts: Starts
    schedule: Sequence[float]
    solver: LoopSolver
    guidance: Guidance | None = None

    def __len__(self) -> int:
        return len(self.starts.noise)

    def settings(self, starts: Starts) -> dict[str, Any]:
        """Conditions, guidance and noise of the steps, the same at every call."""
        generators = generators_for(starts.seeds.tolist()) if self.solver.needs_noise else None
        return {"cond": starts.cond, "uncond": starts.uncond, "guidance": self.guidance, "generator": generators}

    @torch.no_grad()
    def originals(self, batch: int) -> "Originals":
        """What the model as it is makes of all starts, so many at once."""
        parts = [self._original(self.starts[rows]) for rows in torch.arange(len(self)).split(batch)]
        return Originals.cat(parts)

    def _original(self, starts: Starts) -> "Originals":
        states, settings = [starts.noise], self.settings(starts)
        velocities: list[Tensor] = []

        def note(step: SampleStep) -> None:
            velocities.append((states[-1] - step.denoised) / step.t)
            states.append(step.x)

        sample(self.denoiser, starts.noise, self.schedule, self.solver, progress=False, callback=note, **settings)
        return Originals(torch.stack(states, 1), torch.stack(velocities, 1))


@dataclass(frozen=True)
class Originals(TensorBundle):
    """Runs of the model as it is: states (B, steps + 1, ...) from noise to the end, velocities (B, steps, ...)."""

    states: Tensor
    velocities: Tensor


def runs_of(
    pipe: TextToImagePipeline,
    prompts: Sequence[str],
    steps: int = 8,
    *,
    style: Label | Sequence[Label] = None,
    guidance: float | None = None,
    seed: int = 0,
) -> Runs:
    """The runs that a pipeline of ours makes from prompts, at its default size and shift; picture i has seed + i."""
    if not isinstance(pipe, TextToImagePipeline):
        raise Refusal(
            f"a {type(pipe).__name__} samples in its own way; make Runs of its denoiser and call learn_logits"
        )
    request = expand_request(list(prompts), style if isinstance(style, str | int | None) else list(style), 1)
    names, count = pipe.config["styles"], pipe.num_labels
    text = pipe.text
    conds = label_conditions(request, names, count) if text is None else text_conditions(request, text, names, count)
    device, side = pipe.transformer.device, pipe.config["size"] // pipe.autoencoder.config["factor"]
    frames = (pipe.config["frames"],) if pipe.config["frames"] else ()
    shape = (len(request.prompts), pipe.autoencoder.config["latent_channels"], *frames, side, side)
    seeds = list(range(seed, seed + shape[0]))
    schedule = uniform_schedule(steps, pipe.config["default_shift"])
    scale = 1.0 if conds.uncond is None else pipe.config["default_guidance"] if guidance is None else guidance
    starts = Starts(
        randn(shape, generators_for(seeds), device),
        conds.cond.to(device),
        None if conds.uncond is None else conds.uncond.to(device),
        torch.tensor([derive_seed("steps", one) for one in seeds]),
    )
    return Runs(pipe.transformer, starts, schedule, solver_for(pipe.scheduler, schedule), Guidance(float(scale)))
