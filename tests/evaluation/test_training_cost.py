"""What a training costs is counted on a sample, and the table adds up."""

import pytest
import torch

from smalti.backbones.microdit import MicroDiT
from smalti.core.protocols import Batch, Cond
from smalti.evaluation.training_cost import TrainingCost, cost_table, sample_flops
from smalti.objectives.masked_loss import MaskedFlowMatching
from smalti.ops.token_masks import RandomMask


def batch(count):
    return Batch(torch.randn(count, 4, 8, 8), Cond(text=torch.randn(count, 5, 12)), torch.arange(count))


def objective(ratio):
    return MaskedFlowMatching(RandomMask(ratio), 2)


def test_a_sample_costs_the_same_in_every_batch():
    model = MicroDiT.tiny()
    assert sample_flops(model, objective(0.5), batch(1)) == sample_flops(model, objective(0.5), batch(3))


def test_a_mask_costs_less_and_a_backward_is_counted():
    model = MicroDiT.tiny()
    whole, masked = (sample_flops(model, objective(ratio), batch(2)) for ratio in (0.0, 0.75))
    assert masked < 0.8 * whole
    linear = torch.nn.Linear(6, 6)

    class Square:
        def loss(self, denoiser, given, state, generator):
            return type("Result", (), {"loss": denoiser(given.x0).square().mean()})

    given = Batch(torch.randn(2, 6), Cond(), torch.arange(2))
    assert sample_flops(linear, Square(), given) == 2 * 36 * 2  # forward, and the gradient of the weights


def test_gradients_and_weights_stay():
    model = MicroDiT.tiny()
    weights = [one.detach().clone() for one in model.parameters()]
    model.proj_out.weight.grad = torch.ones_like(model.proj_out.weight)
    sample_flops(model, objective(0.5), batch(2))
    assert torch.equal(model.proj_out.weight.grad, torch.ones_like(model.proj_out.weight))
    assert sum(one.grad is not None for one in model.parameters()) == 1
    assert all(torch.equal(one, other) for one, other in zip(weights, model.parameters()))


def test_the_table_adds_up():
    costs = [TrainingCost("masked", 10, 320, 2e15, 0.5), TrainingCost("unmasked", 2, 64, 1e15, 0.25)]
    lines = cost_table(costs).splitlines()
    assert [line.split()[0] for line in lines] == ["stage", "masked", "unmasked", "in"]
    assert lines[-1].split()[2:6] == ["12", "384", "3", "0.75"]
    assert costs[0].rate == pytest.approx(2e15 / 1800)
