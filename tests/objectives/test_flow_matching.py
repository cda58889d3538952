import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.core.time import expand_time
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.time_sampling import LogitNormal, Uniform

STATE = TrainState()


def make_batch(count=6, shape=(3, 4, 4)):
    x0 = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    return Batch(x0, Cond(label=torch.arange(count)), torch.arange(100, 100 + count))


def loss(objective, denoiser, batch, seeds):
    return objective.loss(denoiser, batch, STATE, generators_for(seeds)).loss


def test_the_true_velocity_has_no_loss_whatever_the_target():
    batch = make_batch()

    def truth(xt, t, cond):
        assert torch.equal(cond.label, batch.cond.label)
        return (xt - batch.x0) / expand_time(t, xt)  # xt = x0 + t * (noise - x0)

    for target in ("velocity", "x0", "eps"):
        assert loss(FlowMatching(target=target), truth, batch, range(6)) < 1e-6
    assert loss(FlowMatching(), lambda xt, t, cond: truth(xt, t, cond) + 1, batch, range(6)).item() == pytest.approx(
        1, rel=1e-3
    )


def test_targets_differ_by_the_square_of_the_time():
    batch = make_batch()
    zero = lambda xt, t, cond: torch.zeros_like(xt)  # noqa: E731
    velocity, t = FlowMatching().errors(zero, batch, generators_for(range(6)))
    x0, _ = FlowMatching(target="x0").errors(zero, batch, generators_for(range(6)))
    eps, _ = FlowMatching(target="eps").errors(zero, batch, generators_for(range(6)))
    torch.testing.assert_close(x0, t**2 * velocity)
    torch.testing.assert_close(eps, (1 - t) ** 2 * velocity)


@pytest.mark.parametrize("strata", [1, 6])
def test_a_loss_does_not_depend_on_how_the_batch_is_split(strata):
    batch, objective = make_batch(), FlowMatching(shift=2.0, strata=strata)
    zero = lambda xt, t, cond: 0.3 * xt  # noqa: E731
    whole = loss(objective, zero, batch, range(6))
    halves = [loss(objective, zero, batch[part], range(6)[part]) for part in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_weight_and_shift_act():
    batch = make_batch()
    zero = lambda xt, t, cond: torch.zeros_like(xt)  # noqa: E731
    error, t = FlowMatching(Uniform()).errors(zero, batch, generators_for(range(6)))
    weighted = loss(FlowMatching(Uniform(), weight=lambda t: 1 / t), zero, batch, range(6))
    torch.testing.assert_close(weighted, (error / t).mean())
    _, shifted = FlowMatching(Uniform(), shift=3.0).errors(zero, batch, generators_for(range(6)))
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t))


def test_the_best_linear_denoiser_of_normal_samples_is_the_known_one():
    """For x0 ~ N(0, s^2), `v = xt * (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2)` minimises the loss at t."""
    count, s, time = 20000, 0.5, 0.3
    x0 = s * torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    batch = Batch(x0, Cond(), torch.arange(count))
    slope = torch.zeros((), requires_grad=True)
    objective = FlowMatching(LogitNormal(torch.logit(torch.tensor(time)).item(), 1e-6))
    optimizer = torch.optim.LBFGS([slope], max_iter=10)

    def closure():
        optimizer.zero_grad()
        value = objective.loss(lambda xt, t, cond: slope * xt, batch, STATE, torch.Generator().manual_seed(3)).loss
        value.backward()
        return value

    optimizer.step(closure)
    expected = (time - (1 - time) * s**2) / ((1 - time) ** 2 * s**2 + time**2)
    assert slope.item() == pytest.approx(expected, abs=0.05)


def test_a_floor_leaves_noise_at_the_data_s_end_and_none_but_noise_at_the_other():
    """The paper's own formulas: xt = (1 - t) x0 + (e + (1 - e) t) noise, velocity (1 - e) noise - x0."""
    batch, e = make_batch(), 0.25
    seen = {}

    def denoiser(xt, t, cond):
        seen["xt"], seen["t"] = xt, expand_time(t, xt)
        return torch.zeros_like(xt)

    error, _ = FlowMatching(floor=e).errors(denoiser, batch, generators_for(range(6)))
    t, spread = seen["t"], e + (1 - e) * seen["t"]
    noise = (seen["xt"] - (1 - t) * batch.x0) / spread
    torch.testing.assert_close(error, ((1 - e) * noise - batch.x0).square().flatten(1).mean(1), rtol=1e-4, atol=0)
    drawn = []
    for one in generators_for(range(6)):
        torch.rand(1, generator=one)
        drawn.append(torch.randn(batch.x0.shape[1:], generator=one))
    torch.testing.assert_close(noise, torch.stack(drawn), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["velocity", "x0", "eps"])
def test_with_a_floor_the_true_velocity_has_no_loss_either(target):
    batch, e = make_batch(), 0.1

    def truth(xt, t, cond):
        t = expand_time(t, xt)
        noise = (xt - (1 - t) * batch.x0) / (e + (1 - e) * t)
        return (1 - e) * noise - batch.x0

    assert loss(FlowMatching(target=target, floor=e), truth, batch, range(6)) < 1e-6
    assert loss(FlowMatching(floor=0.0), truth, batch, range(6)) > 1e-3


def test_half_precision_samples_give_a_float32_loss():
    batch = make_batch().to(torch.bfloat16)

    def denoiser(xt, t, cond):
        assert xt.dtype == torch.bfloat16
        return xt

    assert loss(FlowMatching(), denoiser, batch, range(6)).dtype == torch.float32


@pytest.mark.parametrize(
    "settings", [{"target": "noise"}, {"shift": 0.0}, {"shift": float("inf")}, {"strata": 0}, {"floor": 1.0}]
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(UserError):
        FlowMatching(**settings)
