"""What a trial of EcoDiff is made of: prompts to learn from, losses for Taylor's rule, the error of gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from smalti.acceleration.ecodiff_runs import Runs, runs_of
from smalti.core.seeds import derive_seed, generators_for, randn
from smalti.core.time import interpolate
from smalti.data.emoji import load_emoji
from smalti.evaluation.emoji_metrics import spread
from smalti.sampling.checkpointed import sample_checkpointed
from smalti.sampling.loop import sample
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.solvers import Euler
from smalti.seams.units import UnitGroup, masked


def emoji_runs(
    pipe: TextToImagePipeline, topics: Sequence[str] | None, count: int, steps: int, guidance: float, seed: int
) -> Runs:
    """Runs from captions of training concepts, evenly spread; picture i has seed + i."""
    train = load_emoji("train", list(pipe.config["styles"]), topics)
    items = [train.items[index] for index in spread(len(train), count)]
    styles = [item.style for item in items]
    return runs_of(pipe, [item.label for item in items], steps, style=styles, guidance=guidance, seed=seed)


def denoising_losses(runs: Runs, batch: int = 16) -> list[Callable[[], Tensor]]:
    """The flow-matching loss on what the model itself drew, at every time of the schedule, one function a time."""
    drawn = runs.originals(batch).states[:, -1]
    noise = randn(drawn.shape, generators_for([derive_seed("taylor", one) for one in range(len(runs))]), drawn.device)

    def loss(t: float) -> Tensor:
        times = torch.full((len(drawn),), t, device=drawn.device)
        velocity = runs.denoiser(interpolate(drawn, noise, times), times, runs.starts.cond)
        return (velocity - (noise - drawn)).square().mean()

    return [lambda t=t: loss(t) for t in runs.schedule[:-1]]


def gradient_error(model: nn.Module, groups: Sequence[UnitGroup], runs: Runs) -> float:
    """Largest difference between checkpointed and full-graph gradients of all masks, over the largest gradient.

    Measured on the first two pictures and every other step of the schedule.
    """
    starts = runs.starts[:2]
    masks = {group.name: torch.full((group.count,), 0.9, requires_grad=True) for group in groups}
    weights, settings = list(masks.values()), runs.settings(starts)
    schedule = [*runs.schedule[:-1:2], runs.schedule[-1]]
    solver = Euler()  # one of diffusers is made for its own schedule
    with masked(model, groups, masks):
        final = sample_checkpointed(runs.denoiser, starts.noise, schedule, solver, weights, **settings)
        ours = torch.autograd.grad(final.square().mean(), weights)
        final = sample(runs.denoiser, starts.noise, schedule, solver, progress=False, **settings).x
        full = torch.autograd.grad(final.square().mean(), weights)
    error = max(float((one - other).abs().max()) for one, other in zip(ours, full, strict=True))
    return error / max(float(one.abs().max()) for one in full)
