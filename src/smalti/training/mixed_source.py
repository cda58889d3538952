"""Training samples from several sets at fixed shares, such as real and synthetic pictures.

The first set is seen whole, each sample once an epoch; of every other one so many samples are drawn in that time as its
share wants, at random, by the generator of the draw.

Source: MicroDiT (arXiv 2407.15811), section 3.4 and table 5: synthetic pictures beside real ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Batch
from smalti.core.seeds import rand
from smalti.training.data_order import SampleSource


@dataclass(frozen=True)
class MixedSource:
    """A `SampleSource` of several; their samples have one shape and the same conditions.

    Args:
        parts: the sets.
        shares: of the samples that are seen, above 0, with the sum 1.

    Raises:
        UserError: shares do not fit, or a set is empty.
        Refusal: a set holds several shapes.

    Example:
        >>> MixedSource([real, drawn], [0.6, 0.4])
    """

    parts: Sequence[SampleSource]
    shares: Sequence[float]

    def __post_init__(self):
        if len(self.parts) != len(self.shares) or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(f"got shares {list(self.shares)} for {len(self.parts)} sets; give one above 0 each, sum 1")
        if any(not len(part) for part in self.parts):
            raise UserError("one of the sets to mix is empty; leave it out")
        if any(getattr(part, "groups", None) is not None for part in self.parts):
            raise Refusal("a set of several shapes cannot be mixed: a batch has one shape; mix sets of one shape")

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def counts(self) -> list[int]:
        """How many samples of each set an epoch sees."""
        first = len(self.parts[0])
        return [first, *(max(1, round(first * share / self.shares[0])) for share in self.shares[1:])]

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """The samples `indices` (B,): those below the first set's size are its own, others are drawn."""
        edges = torch.tensor(self.counts).cumsum(0)
        part_of = torch.bucketize(indices, edges, right=True)
        batches, rows = [], []
        for number, part in enumerate(self.parts):
            row = (part_of == number).nonzero()[:, 0]
            if not len(row):
                continue
            own = [generators[index] for index in row.tolist()]
            members = indices[row] if not number else (rand((len(row),), own).double() * len(part)).long()
            batches.append(part.batch(members, own))
            rows.append(row)
        joined = Batch.cat(batches)[torch.cat(rows).argsort()]
        return Batch(joined.x0, joined.cond, indices)
