"""One training step on a batch that stays the same: for timing alone, without data, averaging or logs."""

from collections.abc import Callable

import torch
from torch import nn

from smalti.core.protocols import Batch, Objective, TrainState
from smalti.core.seeds import generators_for


def bare_step(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    precision: torch.dtype | None,
    state: TrainState | None = None,
) -> Callable[[], None]:
    """A function that takes one step: loss, gradient, fused AdamW.

    Args:
        model: on its device, in training mode.
        objective: what is learned.
        batch: samples on the same device.
        precision: of the autocast; None = float32.
        state: what the objective knows of the training; None = nothing.
    """
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=1e-4, fused=True)
    device = batch.x0.device.type

    def step() -> None:
        with torch.autocast(device, precision or torch.bfloat16, enabled=precision is not None):
            loss = objective.loss(model, batch, state or TrainState(), generators_for(batch.ids.tolist())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
