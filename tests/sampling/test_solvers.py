import math

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Solver, SolverState
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import SDE, Euler, Heun, Midpoint

SOLVERS = [Euler(), Heun(), Midpoint(), SDE()]


def run(solver, denoiser, state, schedule, first=0, last=None, seed=0):
    state = state if isinstance(state, SolverState) else SolverState(state)
    for step in range(first, len(schedule) - 1 if last is None else last):
        noise = torch.randn(state.x.shape, generator=torch.Generator().manual_seed(seed + step), dtype=state.x.dtype)
        state = solver.step(state, denoiser, schedule[step], schedule[step + 1], noise)
    return state


@pytest.mark.parametrize("solver", [Euler(), Heun()])
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.0), (0.0, 1.0)])
def test_measured_order_is_the_stated_one(solver, gaussian, start, t, s):
    exact = gaussian.solution(start, t, s)
    steps = (64, 128, 256)
    errors = [
        float((run(solver, gaussian, start, uniform_schedule(n, start=t, end=s)).x - exact).abs().max()) for n in steps
    ]
    slope = math.log2(errors[0] / errors[2]) / 2
    assert abs(slope - solver.order) < 0.15


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.2), (0.2, 1.0)])
def test_midpoint_is_of_second_order(t, s):
    """On a field that is not linear in x; on the Gaussian's one its leading errors cancel."""
    x = torch.tensor([0.5], dtype=torch.float64)
    exact = 1 / (1 / x + t - s)  # of dx/dt = x^2
    errors = [
        float((run(Midpoint(), lambda x, t: x**2, x, uniform_schedule(n, start=t, end=s)).x - exact).abs())
        for n in (32, 128)
    ]
    assert math.log2(errors[0] / errors[1]) / 2 == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_restored_run_is_bit_equal(solver, gaussian, start):
    schedule = uniform_schedule(9, shift=2.0)
    whole = run(solver, gaussian, start, schedule)
    half = run(solver, gaussian, start, schedule, last=4)
    stored = half.map(torch.clone)
    assert torch.equal(run(solver, gaussian, stored, schedule, first=4).x, whole.x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_are_pure(solver, gaussian, start):
    assert isinstance(solver, Solver)
    before, noise = start.clone(), torch.ones_like(start)
    first = solver.step(SolverState(start), gaussian, 0.8, 0.6, noise).x
    assert torch.equal(start, before)
    assert torch.equal(solver.step(SolverState(start), gaussian, 0.8, 0.6, noise).x, first)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.0), (0.05, 1.0)])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_sde_keeps_the_marginals(gaussian, t, s, strength):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 1, generator=generator, dtype=torch.float64) * gaussian.spread(t) + (1 - t) * gaussian.mean
    end = run(SDE(strength), gaussian, x, uniform_schedule(200, start=t, end=s)).x
    assert float(end.mean()) == pytest.approx((1 - s) * gaussian.mean, abs=0.05)
    assert float(end.std()) == pytest.approx(gaussian.spread(s), rel=0.06)


def test_sde_forgets_its_start_and_needs_noise(gaussian, start):
    schedule = uniform_schedule(20)
    first, second = run(SDE(), gaussian, start, schedule, seed=0), run(SDE(), gaussian, start, schedule, seed=99)
    assert (first.x - second.x).abs().max() > 0.1
    assert SDE().needs_noise
    with pytest.raises(UserError, match="noise in every step"):
        SDE().step(SolverState(start), gaussian, 0.5, 0.4)
    with pytest.raises(UserError, match="at least 0"):
        SDE(-1.0)


def test_sde_without_diffusion_is_euler(gaussian, start):
    schedule = uniform_schedule(6)
    assert torch.equal(run(SDE(0.0), gaussian, start, schedule).x, run(Euler(), gaussian, start, schedule).x)


@pytest.mark.parametrize(("solver", "calls"), [(Euler(), 4), (Heun(), 7), (Midpoint(), 8), (SDE(), 4)])
def test_calls(solver, calls, gaussian, start):
    made = []

    def counted(x, t):
        made.append(t)
        return gaussian(x, t)

    run(solver, counted, start, uniform_schedule(4))
    assert len(made) == calls
