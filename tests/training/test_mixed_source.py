"""Sets at fixed shares: every real sample once an epoch, the others as often as their share wants."""

import pytest
import torch

from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Batch, Cond
from smalti.core.seeds import generators_for, rand
from smalti.training.data_order import DataOrder
from smalti.training.mixed_source import MixedSource


class Numbers:
    """Samples that are their own number, after one draw of their generator."""

    def __init__(self, count, first=0, groups=None):
        self.count, self.first, self.groups = count, first, groups

    def __len__(self):
        return self.count

    def batch(self, indices, generators):
        rand((len(indices), 1), generators)
        return Batch((indices + self.first).float()[:, None], Cond(label=indices), indices)


def numbers(source, indices, seed=0):
    batch = source.batch(torch.as_tensor(indices), generators_for([seed + int(i) for i in indices]))
    assert torch.equal(batch.ids, torch.as_tensor(indices))
    return batch.x0[:, 0]


@pytest.mark.parametrize("size", [20, 5000])
def test_shares_hold_over_an_epoch(size):
    source = MixedSource([Numbers(60), Numbers(size, first=1000)], [0.6, 0.4])
    assert len(source) == 100
    seen = torch.cat([numbers(source, DataOrder(source, 10, 0).indices(step)) for step in range(10)])
    assert torch.equal(seen[seen < 1000].sort().values, torch.arange(60.0))
    assert (seen >= 1000).sum() == 40


def test_a_large_set_is_not_seen_at_its_beginning_only():
    source = MixedSource([Numbers(60), Numbers(5000, first=1000)], [0.6, 0.4])
    seen = torch.cat([numbers(source, range(60, 100), seed) for seed in range(0, 1000, 100)])
    assert seen.max() > 5500
    assert len(seen.unique()) > 300


def test_samples_come_in_the_order_asked_for_with_their_own_generators():
    source = MixedSource([Numbers(60), Numbers(20, first=1000)], [0.6, 0.4])
    mixed = numbers(source, [70, 3, 99, 5])
    assert torch.equal(mixed, torch.cat([numbers(source, [one]) for one in (70, 3, 99, 5)]))
    assert mixed[1] == 3
    assert mixed[3] == 5


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(UserError, match="shares"):
        MixedSource([Numbers(3), Numbers(3)], [0.5, 0.6])
    with pytest.raises(UserError, match="shares"):
        MixedSource([Numbers(3)], [0.5, 0.5])
    with pytest.raises(UserError, match="empty"):
        MixedSource([Numbers(3), Numbers(0)], [0.5, 0.5])
    with pytest.raises(Refusal, match="shape"):
        MixedSource([Numbers(3), Numbers(3, groups=[torch.arange(3)])], [0.5, 0.5])
