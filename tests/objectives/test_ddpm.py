import math

import pytest
import torch
from torch import nn

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.core.time import interpolate
from smalti.objectives.beta_process import BetaProcess, take
from smalti.objectives.ddpm import DDPM, EpsDenoiser, binned_log_likelihood, step_log_variance, variational_bound


def make_batch(count=8):
    x0 = torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    return Batch(x0, Cond(), torch.arange(count))


def truth(batch, process, seen=None):
    """The network that knows the data."""

    def network(z, time, cond):
        index = (time * process.count).round().long()
        if seen is not None:
            seen.append(index)
        return (z - take(process.alphas, index, z) * batch.x0) / take(process.sigmas, index, z)

    return network


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_true_noise_has_no_loss(kind):
    batch, process, seen = make_batch(), BetaProcess(kind), []
    loss = DDPM(process).loss(truth(batch, process, seen), batch, TrainState(), generators_for(range(8))).loss
    assert loss < 1e-6
    assert len(seen[0].unique()) > 4
    wrong = DDPM(process).loss(lambda z, time, cond: torch.zeros_like(z), batch, TrainState(), generators_for(range(8)))
    assert wrong.loss == pytest.approx(1, abs=0.2)


def test_a_loss_does_not_depend_on_how_the_batch_is_split():
    batch, objective = make_batch(), DDPM()
    losses = [
        objective.loss(lambda z, time, cond: 0.3 * z, one, TrainState(), generators_for(seeds)).loss
        for one, seeds in ((batch, range(8)), (batch[:4], range(4)), (batch[4:], range(4, 8)))
    ]
    torch.testing.assert_close(losses[0], torch.stack(losses[1:]).mean())


def test_the_bound_teaches_the_variance_alone_and_is_least_where_it_is_true():
    """With the true noise the backward step's mean is right; the best variance is then the posterior's (f = 0)."""
    batch, process = make_batch(), BetaProcess(count=50)
    index = torch.tensor([3, 7, 20, 49, 1, 30, 11, 5])
    z = take(process.alphas, index, batch.x0) * batch.x0 + take(process.sigmas, index, batch.x0) * torch.randn(
        8, 2, 3, 3
    )
    eps = truth(batch, process)(z, index / process.count, Cond())
    bounds = [
        float(variational_bound(process, batch.x0, z, index, eps, torch.full_like(z, value)).mean())
        for value in (-1.0, 0.0, 1.0)
    ]
    assert bounds[0] == pytest.approx(0, abs=1e-4)
    assert bounds[0] < bounds[1] < bounds[2]
    output = torch.zeros(8, 4, 3, 3, requires_grad=True)
    result = DDPM(process, learned_variance=True).loss(
        lambda z, time, cond: output, batch, TrainState(), generators_for(range(8))
    )
    whole = torch.autograd.grad(result.loss, output)[0]
    plain = torch.zeros(8, 2, 3, 3, requires_grad=True)
    simple = DDPM(process).loss(lambda z, time, cond: plain, batch, TrainState(), generators_for(range(8))).loss
    torch.testing.assert_close(whole[:, :2], torch.autograd.grad(simple, plain)[0])
    assert whole[:, 2:].abs().sum() > 0
    assert float((result.loss - simple).detach()) == pytest.approx(1e-3 * 50 * float(result.metrics["bound"]), rel=1e-3)


def test_variances_lie_between_the_posterior_s_and_beta():
    process, index = BetaProcess(), torch.tensor([0, 10, 999])
    for value, table in ((-1.0, process.posterior_variances), (1.0, process.betas)):
        found = step_log_variance(process, index, torch.full((3, 1), value)).exp()[:, 0]
        torch.testing.assert_close(found, table[index].float())


def test_the_bins_hold_all_of_the_mass():
    levels = torch.linspace(-1, 1, 256)
    mass = binned_log_likelihood(levels, torch.full((256,), 0.3), torch.full((256,), math.log(0.5))).exp()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_process_goes_from_data_to_noise_in_our_time(kind):
    process = BetaProcess(kind)
    assert process.times[0] < 0.05
    assert process.times[-1] > 0.99
    assert (process.times.diff() > 0).all()
    torch.testing.assert_close(process.alphas.square() + process.sigmas.square(), torch.ones(1000, dtype=torch.float64))
    torch.testing.assert_close(process.timestep(process.times), torch.arange(1000.0), atol=2e-3, rtol=0)
    assert process.timestep(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0, 999])


@pytest.mark.parametrize("learned", [False, True])
def test_as_a_denoiser_it_predicts_our_velocity(learned):
    batch, process = make_batch(), BetaProcess()
    noise, index = torch.randn(batch.x0.shape), torch.tensor([0, 5, 100, 300, 500, 700, 900, 990])

    class Network(nn.Module):
        def forward(self, z, time, cond):
            eps = truth(batch, process)(z, time, cond)
            return torch.cat([eps, eps], 1) if learned else eps

    t = process.times[index].float()
    velocity = EpsDenoiser(Network(), process)(interpolate(batch.x0, noise, t), t, Cond())
    torch.testing.assert_close(velocity, noise - batch.x0, atol=5e-2, rtol=0)
    assert EpsDenoiser(Network(), process)(noise, torch.ones(8), Cond()).isfinite().all()


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="learned_variance"):
        DDPM(learned_variance=True).loss(lambda z, time, cond: z, make_batch(), TrainState(), generators_for(range(8)))
    with pytest.raises(UserError, match="kind of betas"):
        BetaProcess("square")
    with pytest.raises(UserError, match="at least 21"):
        BetaProcess(count=10)
