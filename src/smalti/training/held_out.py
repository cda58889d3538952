"""The loss on samples that were never trained on, with the same noise and times at every call."""

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Denoiser, Objective, TrainState
from smalti.training.data_order import SampleSource
from smalti.training.sample_draws import draw


class HeldOut:
    """Held-out samples, dealt out to processes batch by batch.

    Args:
        source: the samples.
        limit: at most so many are used, taken evenly from all.
        batch: samples in one forward.
        seed: of noise, times and captions.

    Raises:
        UserError: there is no sample.
    """

    def __init__(self, source: SampleSource, limit: int, batch: int, seed: int):
        self.source, self.seed = source, seed
        groups = getattr(source, "groups", None) or [torch.arange(len(source))]
        if not any(len(group) for group in groups):
            raise UserError("the held-out set is empty; give at least one sample, or no held-out set")
        stride = max(1, -(-sum(len(group) for group in groups) // limit))
        self.batches = [part for group in groups for part in group[::stride].split(batch)]

    @torch.no_grad()
    def loss(
        self,
        objective: Objective,
        denoiser: Denoiser,
        state: TrainState,
        device: torch.device,
        rank: int = 0,
        processes: int = 1,
    ) -> Tensor:
        """Sum of this process's sample losses and their number (2,); add over processes, then divide."""
        total = torch.zeros(2, device=device)
        for first in range(0, len(self.batches), processes):
            # A process that has none left computes the last one uncounted: a model in pieces is called by all.
            indices = self.batches[min(first + rank, len(self.batches) - 1)]
            one = draw(self.source, indices, indices, self.seed, "held-out", device)
            value = objective.loss(denoiser, one.batch, state, one.generators).loss
            if first + rank < len(self.batches):
                total += torch.stack([value, torch.ones_like(value)]) * len(indices)
        return total
