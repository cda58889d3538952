import pytest
import torch
from toy_training import ToySource

from smalti.core.errors import UserError
from smalti.training.data_order import DataOrder

GROUPS = [torch.arange(0, 20), torch.arange(20, 27), torch.arange(27, 30)]


def test_every_epoch_visits_each_sample_once_in_another_order():
    order = DataOrder(ToySource(30), batch=7, seed=3)
    stream = torch.cat([order.indices(step) for step in range(30)])  # 7 epochs; batches straddle their borders
    epochs = stream[: 7 * 30].split(30)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(30))
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_order_is_a_pure_function_of_seed_and_step(groups):
    forward, jumping = (DataOrder(ToySource(30, groups=groups), 7, seed=3) for _ in range(2))
    wanted = {step: forward.indices(step) for step in range(60)}
    for step in (59, 3, 58, 0, 31):
        assert torch.equal(jumping.indices(step), wanted[step])
    other = DataOrder(ToySource(30, groups=groups), 7, seed=4)
    assert any(not torch.equal(other.indices(step), wanted[step]) for step in range(5))


def test_groups_are_never_mixed_and_every_sample_is_seen_equally_often():
    order = DataOrder(ToySource(30, groups=GROUPS), batch=5, seed=0)
    counts = torch.zeros(30)
    for step in range(600):
        indices = order.indices(step)
        assert sum(bool(torch.isin(indices, group).any()) for group in GROUPS) == 1
        counts += torch.bincount(indices, minlength=30)
    assert counts.min() >= 96  # 100 each on average
    assert counts.max() <= 104


def test_schedule_of_groups_goes_on_over_its_chunks():
    order = DataOrder(ToySource(30, groups=GROUPS), batch=1, seed=0)
    stream = torch.cat([order.indices(step) for step in range(9000)])
    assert torch.bincount(stream, minlength=30).sub(300).abs().max() <= 3
    for group in GROUPS:  # nothing but whole permutations
        own = stream[torch.isin(stream, group)]
        for epoch in own[: len(own) // len(group) * len(group)].split(len(group)):
            assert torch.equal(epoch.sort().values, group)


def test_a_batch_larger_than_the_set_repeats_it():
    assert sorted(DataOrder(ToySource(3), 7, 0).indices(0).tolist()[:6]) == [0, 0, 1, 1, 2, 2]


def test_positions_name_every_draw_once():
    order = DataOrder(ToySource(30), batch=7, seed=3)
    assert torch.cat([order.positions(step) for step in range(3)]).tolist() == list(range(21))


@pytest.mark.parametrize("groups", [None, [torch.arange(0)]])
def test_an_empty_set_is_refused(groups):
    with pytest.raises(UserError, match="empty"):
        DataOrder(ToySource(0, groups=groups), 4, 0)
