"""From positions in a training to batches: every draw has a generator of its own, whoever computes it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smalti.core.protocols import Batch
from smalti.core.seeds import derive_seed, generators_for
from smalti.training.data_order import DataOrder, SampleSource


@dataclass(frozen=True)
class Draw:
    """A batch, its ids being the positions of its draws, and one generator a sample, already used by the source."""

    batch: Batch
    generators: list[torch.Generator]


def draw(
    source: SampleSource, indices: Tensor, positions: Tensor, seed: int, purpose: str, device: torch.device
) -> Draw:
    """Fetches samples; everything random about a sample follows from (seed, purpose, its position).

    Args:
        source: of the samples.
        indices: which samples (B,).
        positions: names of the draws (B,).
        seed: of the training.
        purpose: keeps draws for different ends apart, such as "train" and "held-out".
        device: where the batch is put.
    """
    generators = generators_for([derive_seed(seed, purpose, position) for position in positions.tolist()])
    batch = source.batch(indices, generators)
    if len(batch.x0) != len(indices):
        raise ValueError(f"the source gave {len(batch.x0)} samples for {len(indices)} indices")
    return Draw(replace(batch, ids=positions).to(device), generators)


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one process computes.

    Args:
        rank: of this process.
        processes: how many there are.
        accumulate: parts one after the other.
    """

    rank: int
    processes: int
    accumulate: int

    def part(self, step: int, index: int, order: DataOrder) -> tuple[Tensor, Tensor]:
        """Indices and positions (B / processes / accumulate,) of part `index` of this step."""
        size = order.batch // (self.processes * self.accumulate)
        start = (index * self.processes + self.rank) * size
        span = slice(start, start + size)
        return order.indices(step)[span], order.positions(step)[span]
