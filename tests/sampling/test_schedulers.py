import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from smalti.core.errors import UserError
from smalti.core.protocols import SolverState
from smalti.sampling.schedulers import SOLVERS, SchedulerSolver, make_scheduler, solver_for
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import SDE, Euler, Heun

ODE = ["euler", "heun", "dpm++", "unipc"]


def run(solver, denoiser, state, schedule, first=0, last=None):
    for step in range(first, len(schedule) - 1 if last is None else last):
        noise = torch.randn(state.x.shape, generator=torch.Generator().manual_seed(step), dtype=state.x.dtype)
        state = solver.step(state, denoiser, schedule[step], schedule[step + 1], noise)
    return state


@pytest.mark.parametrize(("name", "own"), [("euler", Euler()), ("heun", Heun())])
def test_equal_to_our_own_solver(name, own, gaussian, start):
    schedule = uniform_schedule(6, shift=3.0)
    state = SolverState(start.float())
    theirs = run(solver_for(make_scheduler(name), schedule), gaussian, state, schedule).x
    assert torch.allclose(theirs, run(own, gaussian, state, schedule).x, atol=1e-5)


@pytest.mark.parametrize(("name", "least"), [("dpm++", 1.5), ("unipc", 1.9)])
def test_multistep_schedulers_beat_first_order(name, least, gaussian, start):
    """DPM-Solver++ takes its first and last step at first order, so its measured order lies below 2."""
    exact = gaussian.solution(start.float(), 1.0, 0.0)
    errors = []
    for steps in (32, 64, 128):
        schedule = uniform_schedule(steps)
        end = run(solver_for(make_scheduler(name), schedule), gaussian, SolverState(start.float()), schedule).x
        errors.append(float((end - exact).abs().max()))
    assert math.log2(errors[0] / errors[2]) / 2 > least
    plain = run(Euler(), gaussian, SolverState(start.float()), uniform_schedule(128)).x
    assert errors[2] < 0.2 * float((plain - exact).abs().max())


@pytest.mark.parametrize("name", [*ODE, "sde", "sde-dpm"])
def test_restored_run_is_bit_equal(name, gaussian, start):
    schedule = uniform_schedule(7, shift=2.0)
    if name == "sde-dpm":
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type="sde-dpmsolver++"
        )
    else:
        scheduler = make_scheduler(name)
    solver = solver_for(scheduler, schedule)
    whole = run(solver, gaussian, SolverState(start.float()), schedule)
    half = run(solver, gaussian, SolverState(start.float()), schedule, last=4)
    stored = half.map(torch.clone)
    again = run(solver_for(scheduler, schedule), gaussian, stored, schedule, first=4)
    assert torch.equal(again.x, whole.x)
    rows = run(solver, gaussian, half[1:2], schedule, first=4).x
    if not solver.needs_noise:
        assert torch.equal(rows, whole.x[1:2])


@pytest.mark.parametrize("name", ODE)
def test_starts_anywhere_in_the_schedule(name, gaussian):
    schedule = uniform_schedule(60)
    start = torch.tensor([[0.3, 1.2]])
    end = run(solver_for(make_scheduler(name), schedule), gaussian, SolverState(start), schedule, first=24).x
    assert torch.allclose(end, gaussian.solution(start, schedule[24], 0.0), atol=0.05)


def test_its_own_shift_is_not_applied_twice(gaussian, start):
    schedule = uniform_schedule(5, shift=2.0)
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
    ):
        end = run(SchedulerSolver(scheduler, schedule), gaussian, SolverState(start.float()), schedule).x
        plain = run(Euler(), gaussian, SolverState(start.float()), schedule).x
        assert torch.allclose(end, plain, atol=1e-5)


def test_scheduler_is_not_changed(gaussian, start):
    scheduler = make_scheduler("dpm++")
    before = dict(vars(scheduler))
    schedule = uniform_schedule(4)
    run(solver_for(scheduler, schedule), gaussian, SolverState(start.float()), schedule)
    assert all(vars(scheduler)[name] is value for name, value in before.items())


@pytest.mark.parametrize("name", SOLVERS)
def test_schedulers_are_saved(name, tmp_path):
    scheduler = make_scheduler(name)
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    kept = {key: value for key, value in again.config.items() if not key.startswith("_")}
    assert kept == {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def test_sde_by_name():
    assert isinstance(solver_for(make_scheduler("sde"), uniform_schedule(3)), SDE)


def test_refuses(gaussian, start):
    schedule = uniform_schedule(4)
    with pytest.raises(UserError, match=r"did you mean 'euler'\?"):
        make_scheduler("eulre")
    with pytest.raises(UserError, match="DDIMScheduler does not run flow models"):
        SchedulerSolver(DDIMScheduler(), schedule)
    with pytest.raises(UserError, match="prediction_type='flow_prediction'"):
        SchedulerSolver(DPMSolverMultistepScheduler(), schedule)
    with pytest.raises(UserError, match="stochastic_sampling"):
        SchedulerSolver(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), schedule)
    with pytest.raises(UserError, match="falls from at most 1 to 0"):
        SchedulerSolver(make_scheduler("euler"), [0.0, 0.5, 1.0])
    with pytest.raises(UserError, match="not in the schedule"):
        solver_for(make_scheduler("euler"), schedule).step(SolverState(start), gaussian, 0.9, 0.1)
