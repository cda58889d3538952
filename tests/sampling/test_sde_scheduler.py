import pytest
import torch

from smalti.core.protocols import SolverState
from smalti.sampling.sde_scheduler import FlowMatchSDEScheduler
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import SDE


def test_steps_equal_the_solver(gaussian, start):
    scheduler = FlowMatchSDEScheduler(shift=2.0, strength=0.7)
    scheduler.set_timesteps(5)
    schedule = uniform_schedule(5, shift=2.0)
    assert (scheduler.timesteps / 1000).tolist() == pytest.approx(schedule[:-1])
    x = start.float()
    state, generator, other = SolverState(x), torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(gaussian(x, float(timestep) / 1000), timestep, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=other)
        state = SDE(0.7).step(state, gaussian, schedule[step], schedule[step + 1], noise)
    assert torch.allclose(x, state.x, atol=1e-4)


def test_given_sigmas():
    scheduler = FlowMatchSDEScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.4])
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.4, 0.0])
    assert scheduler.step(torch.ones(1, 2), 1000.0, torch.zeros(1, 2), return_dict=False)[0].shape == (1, 2)
