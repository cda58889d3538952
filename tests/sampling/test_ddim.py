import math
from itertools import pairwise

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import SolverState
from smalti.objectives.beta_process import BetaProcess
from smalti.sampling.ddim import DDIM, ddim_schedule, sample_ddim
from smalti.sampling.solvers import Euler


def test_the_schedule_has_evenly_spaced_timesteps_from_the_noisiest():
    process = BetaProcess()
    schedule = ddim_schedule(process, 4)
    assert schedule == [float(process.times[index]) for index in (999, 749, 499, 249)] + [0.0]
    assert len(ddim_schedule(process, 1000)) == 1001
    for steps in (0, 1001):
        with pytest.raises(UserError, match="from 1 to the 1000"):
            ddim_schedule(process, steps)


def test_without_fresh_noise_it_is_the_paper_s_step_and_euler_s(gaussian, start):
    t, s = 0.8, 0.35
    found = DDIM().step(SolverState(start), gaussian, t, s).x
    assert torch.equal(found, Euler().step(SolverState(start), gaussian, t, s).x)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = [
        ((1 - u) / math.hypot(1 - u, u), u / math.hypot(1 - u, u)) for u in (t, s)
    ]
    z, velocity = start * (alpha_t + sigma_t), gaussian(start, t)
    eps = start + (1 - t) * velocity
    by_paper = alpha_s * (z - sigma_t * eps) / alpha_t + sigma_s * eps  # equation 12 with no noise
    torch.testing.assert_close(found * (alpha_s + sigma_s), by_paper)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_fresh_noise_keeps_the_marginals(gaussian, eta):
    generator = torch.Generator().manual_seed(3)
    schedule = ddim_schedule(BetaProcess("cosine"), 200)
    x = torch.randn(4000, 1, generator=generator, dtype=torch.float64) * gaussian.spread(schedule[0])
    state = SolverState(x + (1 - schedule[0]) * gaussian.mean)
    for t, s in pairwise(schedule):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        state = DDIM(eta).step(state, gaussian, t, s, noise)
    assert float(state.x.mean()) == pytest.approx(gaussian.mean, abs=0.06)
    assert float(state.x.std()) == pytest.approx(gaussian.deviation, rel=0.08)


def test_samples_begin_at_noise_of_unit_length(gaussian):
    def denoiser(x, t, cond):
        return gaussian(x, float(t[0]))

    process, noise = BetaProcess(), torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    drawn = sample_ddim(denoiser, noise, process, 100, progress=False)
    assert float(drawn.mean()) == pytest.approx(gaussian.mean, abs=0.1)
    assert float(drawn.std()) == pytest.approx(gaussian.deviation, rel=0.1)


def test_what_cannot_work_is_refused(gaussian, start):
    with pytest.raises(UserError, match="eta"):
        DDIM(1.5)
    assert DDIM(0.5).needs_noise
    with pytest.raises(UserError, match="give noise"):
        DDIM(0.5).step(SolverState(start), gaussian, 0.8, 0.4)
    with pytest.raises(UserError, match="towards data"):
        DDIM(0.5).step(SolverState(start), gaussian, 0.4, 0.8, torch.zeros_like(start))
