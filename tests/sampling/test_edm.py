"""EDM's sampler: its noise levels, its order, and its start."""

import itertools

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Cond, SolverState
from smalti.core.time import expand_time
from smalti.sampling.edm import SigmaHeun, edm_schedule, sample_edm
from smalti.sampling.solvers import Heun

S = 0.5


def normal(x, t, cond=None):
    """The exact denoiser of data from N(0, S^2): D = S^2 / (S^2 + sigma^2) z."""
    t = expand_time(t, x) if isinstance(t, torch.Tensor) else t
    sigma, z = t / (1 - t), x / (1 - t)
    denoised = S**2 / (S**2 + sigma**2) * z
    return (z - denoised) / sigma - denoised


def test_levels_are_those_of_the_paper():
    levels = [t / (1 - t) for t in edm_schedule(18)]
    assert levels[0] == pytest.approx(80)
    assert levels[-2] == pytest.approx(0.002)
    assert levels[-1] == 0
    middle = (80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert levels[5] == pytest.approx(middle)


def test_order_is_two():
    x0 = torch.tensor([[1.0]], dtype=torch.float64)
    errors = []
    for steps in (20, 40, 80):
        levels = torch.linspace(10.0, 0.1, steps + 1, dtype=torch.float64)
        times = (levels / (1 + levels)).tolist()
        state = SolverState(x0 * (S**2 + 100) ** 0.5 * (1 - times[0]))
        for t, s in itertools.pairwise(times):
            state = SigmaHeun().step(state, normal, t, s)
        errors.append(abs(state.x / (1 - times[-1]) - x0 * (S**2 + 0.01) ** 0.5).item())
    assert 3.2 < errors[0] / errors[1] < 4.8
    assert 3.2 < errors[1] / errors[2] < 4.8


def test_samples_have_the_data_s_spread():
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    drawn = sample_edm(normal, noise, steps=30, progress=False)
    assert drawn.std().item() == pytest.approx(S, rel=0.02)
    unscaled = sample_edm(normal, noise / edm_schedule(30)[0] * 1.5, steps=30, progress=False)
    assert unscaled.std().item() == pytest.approx(1.5 * S, rel=0.05)  # a start of another size is carried to the end


def test_its_steps_are_not_those_of_heun_in_time():
    x, (t, s) = torch.ones(1, 1), (0.9, 0.5)
    assert SigmaHeun().step(SolverState(x), normal, t, s).x != Heun().step(SolverState(x), normal, t, s).x


def test_the_last_step_has_no_correction():
    calls = []
    SigmaHeun().step(SolverState(torch.ones(1, 1)), lambda x, t: calls.append(t) or normal(x, t), 0.1, 0.0)
    assert calls == [0.1]


def test_guidance_acts():
    given, without = Cond(label=torch.ones(4, dtype=torch.long)), Cond(label=torch.zeros(4, dtype=torch.long))

    def model(x, t, cond):
        return normal(x, t) * (1 + 0.1 * expand_time(cond.label, x))

    noise = torch.randn(4, 1)
    drawn = [sample_edm(model, noise, given, without, scale, steps=5, progress=False) for scale in (1.0, 5.0)]
    assert not torch.allclose(*drawn)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="no end"):
        SigmaHeun().step(SolverState(torch.ones(1, 1)), normal, 1.0, 0.5)
    for settings in ({"steps": 1}, {"steps": 5, "sigma_min": 0.0}, {"steps": 5, "sigma_max": 0.001}):
        with pytest.raises(UserError):
            edm_schedule(**settings)
