"""The second objective counts from its step on."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, LossResult, TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.switched import Switched


class Constant:
    def __init__(self, value):
        self.value = value

    def loss(self, denoiser, batch, state, generator):
        return LossResult(torch.tensor(self.value))


def test_it_switches_once_at_its_step():
    objective = Switched(Constant(1.0), Constant(2.0), at=3)
    batch = Batch(torch.zeros(1, 1), Cond(), torch.arange(1))
    found = [objective.loss(None, batch, TrainState(step), generators_for([0])).loss.item() for step in range(5)]
    assert found == [1, 1, 1, 2, 2]


def test_a_step_below_zero_is_refused():
    with pytest.raises(UserError, match="-1"):
        Switched(Constant(1.0), Constant(2.0), at=-1)
