import pytest
import torch

from smalti.core import time as clock


@pytest.fixture
def path():
    x0, noise, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.rand(5) * 0.9 + 0.05
    return x0, noise, t, clock.interpolate(x0, noise, t), noise - x0


def test_ends_of_the_path(path):
    x0, noise, *_ = path
    assert torch.equal(clock.interpolate(x0, noise, torch.zeros(5)), x0)
    assert torch.equal(clock.interpolate(x0, noise, torch.ones(5)), noise)


def test_estimates_recover_data_and_noise(path):
    x0, noise, t, xt, velocity = path
    torch.testing.assert_close(clock.denoised_from_velocity(xt, velocity, t), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(clock.noise_from_velocity(xt, velocity, t), noise, atol=1e-5, rtol=0)
    score = clock.score_from_velocity(xt, velocity, t)
    torch.testing.assert_close(score, -noise / clock.expand_time(t, x0), atol=1e-4, rtol=1e-4)


def test_score_of_a_gaussian():
    """For x0 ~ N(0, 1) the marginal at t is N(0, (1-t)^2 + t^2) and the best velocity is linear in xt."""
    t, xt = torch.tensor([0.3]), torch.randn(1, 7)
    variance = (1 - t) ** 2 + t**2
    velocity = xt * (t - (1 - t)) / variance
    torch.testing.assert_close(clock.score_from_velocity(xt, velocity, t), -xt / variance)


@pytest.mark.parametrize("process", ["preserving", "exploding"])
def test_other_dialects_and_back(path, process):
    x0, noise, t, _, velocity = path
    sigma = t if process == "preserving" else 20 * t
    alpha = (1 - sigma**2).sqrt() if process == "preserving" else torch.ones_like(t)
    a, s = clock.expand_time(alpha, x0), clock.expand_time(sigma, x0)
    z = a * x0 + s * noise
    ours = clock.time_from_alpha_sigma(alpha, sigma)
    torch.testing.assert_close(z / (a + s), clock.interpolate(x0, noise, ours), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clock.velocity_from_eps(z, noise, alpha, sigma), velocity, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(clock.eps_from_velocity(z, velocity, alpha, sigma), noise, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(clock.velocity_from_denoised(z, x0, alpha, sigma), velocity, atol=2e-4, rtol=1e-4)
    if process == "preserving":
        v = a * noise - s * x0
        torch.testing.assert_close(clock.velocity_from_v(z, v, alpha, sigma), velocity, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(clock.v_from_velocity(z, velocity, alpha, sigma), v, atol=1e-5, rtol=1e-4)


def test_timesteps_and_reversed_time():
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(clock.time_from_timestep(clock.timestep_from_time(t)), t)
    torch.testing.assert_close(clock.reverse_time(clock.reverse_time(t)), t)
    assert clock.timestep_from_time(torch.tensor(1.0)) == 1000


def test_a_time_for_each_frame():
    x0, noise = torch.zeros(2, 3, 4, 5, 5), torch.ones(2, 3, 4, 5, 5)
    t = torch.rand(2, 4)
    assert torch.equal(clock.interpolate(x0, noise, t)[:, 0, :, 0, 0], t)
