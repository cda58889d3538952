"""Which samples a step trains on: a pure function of (seed, step), so that resuming needs nothing but the step.

Every group of samples of equal shape (one group if there are no aspect buckets) is an endless stream: permutation after
permutation of its members, each drawn from a seed of its own. A step takes the next `batch` members of one group's
stream. Which group is decided by the sequence `frac(offset + step * golden ratio)` laid over the groups' shares: each
is visited in proportion to its size, every sample is seen equally often, none is padded or dropped.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Batch
from smalti.core.seeds import derive_seed

GOLDEN = (5**0.5 - 1) / 2
CHUNK = 4096


class SampleSource(Protocol):
    """Training samples by index.

    A source whose samples differ in shape also has an attribute `groups`: a sequence of index tensors (n,), each of
    samples whose x0 have equal shape. A batch never mixes groups.
    """

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generators: list[torch.Generator]) -> Batch:
        """The samples at `indices` (B,) long; each one's generator decides its caption, flip, dropped condition."""
        ...


class DataOrder:
    """The order of the samples of one training.

    Args:
        source: gives the number of samples and their groups.
        batch: samples a step.
        seed: of the permutations.

    Raises:
        UserError: the source holds no sample.
    """

    def __init__(self, source: SampleSource, batch: int, seed: int):
        groups: Sequence[Tensor] | None = getattr(source, "groups", None)
        members = [torch.arange(len(source))] if groups is None else [torch.as_tensor(group).long() for group in groups]
        self.groups = [group for group in members if len(group)]
        if not self.groups:
            raise UserError("the data set is empty: there is nothing to train on; give at least one sample")
        self.batch, self.seed = batch, seed
        sizes = np.array([len(group) for group in self.groups], dtype=np.float64)
        self._edges = np.cumsum(sizes / sizes.sum())[:-1]
        self._offset = derive_seed(seed, "groups") / 2**63
        self._chosen = np.empty(0, dtype=np.int64)
        self._ordinal = np.empty(0, dtype=np.int64)
        self._permutations: dict[int, tuple[int, Tensor]] = {}

    def indices(self, step: int) -> Tensor:
        """The samples of a step (batch,), all of one group."""
        group, ordinal = self._visit(step)
        members = self.groups[group]
        wanted = torch.arange(ordinal * self.batch, (ordinal + 1) * self.batch)
        epochs = wanted // len(members)
        taken = [
            self._permutation(group, int(epoch))[wanted[epochs == epoch] % len(members)]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return members[torch.cat(taken)]

    def positions(self, step: int) -> Tensor:
        """Global positions of a step's draws (batch,): they name its samples' noise, times and captions."""
        return torch.arange(step * self.batch, (step + 1) * self.batch)

    def _visit(self, step: int) -> tuple[int, int]:
        """The group of a step, and how many earlier steps were of this group."""
        if len(self.groups) == 1:
            return 0, step
        while len(self._chosen) <= step:
            steps = np.arange(len(self._chosen), len(self._chosen) + CHUNK, dtype=np.float64)
            chosen = np.searchsorted(self._edges, (self._offset + steps * GOLDEN) % 1.0, side="right")
            ordinal = np.empty(CHUNK, dtype=np.int64)
            for group in range(len(self.groups)):
                here = chosen == group
                ordinal[here] = np.count_nonzero(self._chosen == group) + np.arange(np.count_nonzero(here))
            self._chosen = np.concatenate([self._chosen, chosen])
            self._ordinal = np.concatenate([self._ordinal, ordinal])
        return int(self._chosen[step]), int(self._ordinal[step])

    def _permutation(self, group: int, epoch: int) -> Tensor:
        kept = self._permutations.get(group)
        if kept is None or kept[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", group, epoch))
            kept = (epoch, torch.randperm(len(self.groups[group]), generator=generator))
            self._permutations[group] = kept
        return kept[1]
