"""The direction term by its formula: along channels, at each place, with the path's own velocity."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.core.time import expand_time
from smalti.objectives.cosine_velocity import CosineFlowMatching, direction_error
from smalti.objectives.flow_matching import FlowMatching

BATCH = Batch(torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)), Cond(), torch.arange(6))


def loss_of(objective, denoiser):
    return objective.loss(denoiser, BATCH, TrainState(), generators_for(range(6)))


def test_the_cosine_is_taken_along_the_channels_of_each_place():
    velocity = torch.zeros(1, 2, 1, 2)
    velocity[0, :, 0, 0], velocity[0, :, 0, 1] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    target = torch.tensor([5.0, 0.0])[None, :, None, None].expand(1, 2, 1, 2)
    assert direction_error(velocity, target).tolist() == [pytest.approx(0.5)]  # equal at one place, square at the other
    assert direction_error(-target, target).tolist() == [pytest.approx(2.0)]


def test_the_loss_is_the_sum_of_both():
    seen = {}

    def denoiser(x, t, cond):
        seen["x"], seen["t"] = x, t
        return torch.tanh(x) + 0.3

    both = loss_of(CosineFlowMatching(weight=0.7), denoiser)
    plain = loss_of(FlowMatching(), denoiser).loss
    target = (seen["x"] - BATCH.x0) / expand_time(seen["t"], BATCH.x0)
    expected = plain + 0.7 * direction_error(denoiser(seen["x"], None, None), target).mean()
    assert torch.allclose(both.loss, expected, atol=1e-5)
    assert torch.allclose(both.metrics["flow matching"], plain)
    assert torch.equal(loss_of(CosineFlowMatching(weight=0.0), denoiser).loss, plain)


def test_the_right_velocity_costs_nothing_and_a_longer_one_no_direction():
    def exact(x, t, cond):
        return (x - BATCH.x0) / expand_time(t, x)

    assert float(loss_of(CosineFlowMatching(), exact).loss) < 1e-4
    longer = loss_of(CosineFlowMatching(), lambda x, t, cond: 3 * exact(x, t, cond))
    assert float(longer.metrics["direction"]) < 1e-4
    assert float(longer.metrics["flow matching"]) > 1


def test_a_negative_weight_is_refused():
    with pytest.raises(UserError, match="at least 0"):
        CosineFlowMatching(weight=-1.0)
