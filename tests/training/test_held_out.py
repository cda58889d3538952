import pytest
import torch
from toy_training import ToyDenoiser, ToySource

from smalti.core.errors import UserError
from smalti.core.protocols import TrainState
from smalti.objectives.flow_matching import FlowMatching
from smalti.training.held_out import HeldOut

CPU = torch.device("cpu")


def measure(held_out, model, processes=1):
    total = sum(held_out.loss(FlowMatching(), model, TrainState(), CPU, rank, processes) for rank in range(processes))
    return total.tolist()


def test_loss_is_fixed_and_does_not_depend_on_batches_or_processes():
    model, source = ToyDenoiser(), ToySource(40)
    (loss, count), again = (
        measure(HeldOut(source, 100, 8, seed=1), model),
        measure(HeldOut(source, 100, 8, seed=1), model),
    )
    assert [loss, count] == again
    assert count == 40
    split = measure(HeldOut(source, 100, 7, seed=1), model, processes=3)
    torch.testing.assert_close(torch.tensor(split), torch.tensor([loss, count]))
    assert measure(HeldOut(source, 100, 8, seed=2), model) != again


def test_a_limit_takes_samples_evenly():
    chosen = torch.cat(HeldOut(ToySource(40), 10, 4, seed=1).batches)
    assert chosen.tolist() == list(range(0, 40, 4))


def test_an_empty_set_is_refused():
    with pytest.raises(UserError, match="empty"):
        HeldOut(ToySource(0), 10, 4, seed=1)


def test_groups_are_not_mixed():
    groups = [torch.arange(0, 25), torch.arange(25, 40)]
    for batch in HeldOut(ToySource(40, groups=groups), 100, 8, seed=1).batches:
        assert bool((batch < 25).all()) or bool((batch >= 25).all())
