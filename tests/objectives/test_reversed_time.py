import torch
from torch import nn

from smalti.core.protocols import Batch, Cond, SolverState, TrainState
from smalti.core.seeds import generators_for
from smalti.core.time import expand_time
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.reversed_time import ReversedTime
from smalti.sampling.solvers import Euler

X0 = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


class Other(nn.Module):
    """The true network of the other convention: tau = 0 is noise, and it points from noise to data."""

    def forward(self, x, tau, cond):
        return (X0 - x) / expand_time(1 - tau, x).clamp_min(1e-6)


def test_both_directions_have_the_same_loss_and_the_same_samples():
    batch = Batch(X0, Cond(), torch.arange(5))
    wrapped = ReversedTime(Other())
    loss = FlowMatching().loss(wrapped, batch, TrainState(), generators_for(range(5))).loss
    assert loss < 1e-8
    plain = FlowMatching().loss(Other(), batch, TrainState(), generators_for(range(5))).loss
    assert plain > 0.5  # unwrapped it points the wrong way
    state = SolverState(torch.randn(5, 3))
    for step in range(8):
        state = Euler().step(
            state, lambda x, t: wrapped(x, torch.full((5,), t), Cond()), 1 - step / 8, 1 - (step + 1) / 8
        )
    torch.testing.assert_close(state.x, X0)


def test_the_network_inside_learns_in_its_own_dialect():
    network = nn.Linear(3, 3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = network

        def forward(self, x, tau, cond):
            return self.layer(x) * expand_time(tau, x)

    batch = Batch(X0, Cond(), torch.arange(5))
    FlowMatching().loss(ReversedTime(Net()), batch, TrainState(), generators_for(range(5))).loss.backward()
    assert network.weight.grad.abs().sum() > 0
