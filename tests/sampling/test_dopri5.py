import math
from itertools import pairwise

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Cond, Solver, SolverState
from smalti.core.time import expand_time
from smalti.sampling.dopri5 import ERRORS, NODES, WEIGHTS, Dopri5, effort
from smalti.sampling.guidance import Guidance
from smalti.sampling.loop import sample
from smalti.sampling.solvers import Euler


class Counted:
    """A bound denoiser that notes its times."""

    def __init__(self, denoiser):
        self.denoiser, self.times = denoiser, []

    def __call__(self, x, t):
        self.times.append(t)
        return self.denoiser(x, t)


def run(solver, denoiser, x, t=1.0, s=0.0):
    return solver.step(SolverState(x), denoiser, t, s)


def winding(x, t, speed=40.0):
    """A rotation that is quick near t = 0.5 only."""
    turn = speed * torch.exp(-200 * (torch.as_tensor(t) - 0.5) ** 2).to(x.dtype)
    return expand_time(turn.reshape(-1), x) * torch.stack([x[:, 1], -x[:, 0]], 1)


def test_the_table_is_consistent():
    for node, weights in zip(NODES, WEIGHTS, strict=True):
        assert sum(weights) == pytest.approx(node, abs=1e-14)
    assert sum(ERRORS) == pytest.approx(0, abs=1e-14)
    for power in range(1, 5):  # quadrature of t^power by the fifth-order weights
        found = sum(w * c**power for w, c in zip(WEIGHTS[-1], (0.0, *NODES), strict=False))
        assert found == pytest.approx(1 / (power + 1), abs=1e-14)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.0), (0.0, 1.0)])
def test_it_meets_its_tolerance_and_a_tighter_one_takes_more_calls(gaussian, start, t, s):
    exact, errors, calls = gaussian.solution(start, t, s), [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        state = run(Dopri5(tolerance, tolerance), gaussian, start, t, s)
        errors.append(float((state.x - exact).abs().max()))
        calls.append(int(effort(state).calls[0]))
        assert errors[-1] < 50 * tolerance
    assert errors[0] > errors[1] > errors[2]
    assert calls[0] < calls[1] < calls[2]


def test_its_order_is_five():
    """One trial of size h, never rejected, has an error of h^6."""
    x, errors = torch.full((1, 1), 0.9, dtype=torch.float64), []
    for h in (0.1, 0.05):
        size = {"size": torch.full((1,), h, dtype=torch.float64)}
        found = Dopri5(1e9, 1e9).step(SolverState(x, size), lambda x, t: x**2, 0.7, 0.7 - h).x
        errors.append(abs(float(found) - 1 / (1 / 0.9 + h)))
    assert 5.5 < math.log2(errors[0] / errors[1]) < 7


def test_calls_are_counted_and_steps_rejected():
    x = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    counted = Counted(winding)
    state = run(Dopri5(1e-6, 1e-6), counted, x)
    found = effort(state)
    assert int(found.calls[0]) == len(counted.times)
    assert int(found.rejected[0]) > 0
    assert int(found.calls[0]) == 2 + 6 * int(found.taken[0] + found.rejected[0])
    assert int(found.forced[0]) == 0
    torch.testing.assert_close(state.x.norm(), x.norm(), rtol=1e-4, atol=0)  # turned, not stretched
    few = Counted(lambda x, t: winding(x, t, speed=1.0))
    run(Dopri5(1e-6, 1e-6), few, x)
    assert len(few.times) < len(counted.times) / 2


def test_a_batch_shares_its_error_unless_samples_have_their_own():
    easy, hard = torch.tensor([[1e-3, 0.0]]), torch.tensor([[30.0, 0.0]])

    def field(x, t):
        return winding(x, t, speed=8.0)

    both = torch.cat([easy, hard])
    for is_own in (False, True):
        solver = Dopri5(1e-4, 1e-9, per_sample=is_own)
        alone, together = run(solver, field, easy), run(solver, field, both)
        is_same = torch.equal(alone.x[0], together.x[0])
        calls = int(effort(alone).calls[0]), int(effort(together).calls[0])
        assert is_same is is_own
        assert (calls[0] == calls[1]) is is_own
    assert effort(together).calls[0] < effort(together).calls[1]


def test_coarse_rounding_ends_at_the_smallest_step(gaussian):
    x = torch.randn(2, 3)

    def coarse(x, t):
        return gaussian(x.bfloat16(), t).float()

    counted = Counted(coarse)
    state = run(Dopri5(1e-7, 1e-7, min_step=0.02), counted, x)
    assert state.x.dtype == torch.float32
    assert int(effort(state).forced[0]) > 10
    assert len(counted.times) < 2 + 6 * 4 * 50
    torch.testing.assert_close(state.x, gaussian.solution(x, 1.0, 0.0), atol=0.05, rtol=0)


def test_times_are_kept_in_double_precision():
    """A thousand forced steps are all alike and end at 0 exactly."""
    counted = Counted(lambda x, t: torch.randn_like(x))
    state = run(Dopri5(1e-9, 1e-9, min_step=1e-3), counted, torch.randn(1, 3))
    ends = counted.times[7::6]
    assert state.memory["size"].dtype == torch.float64
    assert ends[-1] == 0.0
    assert 900 < len(ends) <= 1002
    assert max(abs(a - b - 1e-3) for a, b in pairwise(ends[10:-2])) < 1e-12


def test_it_is_a_solver_of_the_loop(gaussian, start):
    solver = Dopri5(1e-8, 1e-8)
    assert isinstance(solver, Solver)

    def denoiser(x, t, cond):
        return gaussian(x, float(t[0]))

    seen = []
    state = sample(denoiser, start, [1.0, 0.7, 0.3, 0.0], solver, callback=lambda step: seen.append(step.s))
    assert seen == [0.7, 0.3, 0.0]
    torch.testing.assert_close(state.x, gaussian.solution(start, 1.0, 0.0), rtol=1e-5, atol=1e-6)
    again = sample(denoiser, start, [1.0, 0.7, 0.3, 0.0], solver)
    assert torch.equal(again.x, state.x)
    half = sample(denoiser, start, [1.0, 0.7], solver)
    rest = sample(denoiser, half.map(torch.clone), [0.7, 0.3, 0.0], solver)
    assert torch.equal(rest.x, state.x)
    assert torch.equal(effort(rest).calls, effort(state).calls)


@pytest.mark.parametrize("per_sample", [False, True])
def test_guidance_doubles_the_rows_of_a_call_and_not_the_state(per_sample):
    """The error is that of the guided velocity alone: it does not matter how the branches are computed."""
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    cond, uncond = Cond(label=torch.tensor([1, 2, 3])), Cond(label=torch.zeros(3, dtype=torch.long))
    states, rows = [], []
    for is_batched in (True, False):

        def denoiser(x, t, cond):
            rows.append(len(x))
            return x * (cond.label * t.square())[:, None]

        guidance = Guidance(2.0, interval=(0.2, 1.0), is_batched=is_batched)
        solver = Dopri5(1e-5, 1e-5, per_sample=per_sample)
        states.append(sample(denoiser, x, [1.0, 0.0], solver, cond=cond, uncond=uncond, guidance=guidance))
    assert states[0].x.shape == x.shape
    assert set(rows) == {3, 6}
    torch.testing.assert_close(states[0].x, states[1].x)
    assert torch.equal(effort(states[0]).calls, effort(states[1]).calls)


def test_it_agrees_with_many_steps_of_euler(gaussian):
    x = torch.randn(4, 3)
    schedule = [1 - step / 2000 for step in range(2001)]
    euler = SolverState(x)
    for t, s in pairwise(schedule):
        euler = Euler().step(euler, gaussian, t, s)
    torch.testing.assert_close(run(Dopri5(), gaussian, x).x, euler.x, atol=2e-3, rtol=0)


def test_what_cannot_work_is_refused(gaussian, start):
    for settings in ({"atol": 0.0}, {"rtol": -1.0}, {"min_step": 0.0}, {"min_step": 0.5}):
        with pytest.raises(UserError, match="tolerances"):
            Dopri5(**settings)
    with pytest.raises(UserError, match="not finite"):
        run(Dopri5(), lambda x, t: x / (x - x), start)
    with pytest.raises(UserError, match="counts nothing"):
        effort(Euler().step(SolverState(start), gaussian, 1.0, 0.5))


def test_gradients_flow(gaussian):
    x = torch.randn(2, 3, requires_grad=True)
    run(Dopri5(1e-3, 1e-3), gaussian, x).x.sum().backward()
    torch.testing.assert_close(
        x.grad, torch.full_like(x, gaussian.spread(0.0) / gaussian.spread(1.0)), rtol=0.05, atol=0
    )
