import io
import sys
import time

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.core.seeds import generators_for
from smalti.sampling import loop
from smalti.sampling.guidance import Guidance
from smalti.sampling.loop import sample
from smalti.sampling.schedulers import make_scheduler, solver_for
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import SDE, Euler, Heun


def straight(x, t, cond):
    """A flow whose every path is straight and ends at `label`."""
    return (x - cond.label.view(-1, 1).to(x.dtype)) / t.view(-1, 1).clamp_min(1e-6)


COND = Cond(label=torch.tensor([2.0, -1.0]))
SCHEDULE = uniform_schedule(5)


def test_ends_where_the_flow_ends(start):
    end = sample(straight, start[:2], SCHEDULE, Euler(), cond=COND).x
    assert torch.allclose(end, COND.label.double()[:, None].expand(2, 5))


def test_callback_sees_steps_previews_and_may_replace(start):
    seen = []

    def callback(step):
        seen.append((step.step, step.steps, step.t, step.s))
        assert torch.allclose(step.denoised, COND.label.double()[:, None].expand(2, 5))
        return torch.zeros_like(step.x) if step.step == 1 else None

    kept = []
    sample(straight, start[:2], SCHEDULE, Heun(), cond=COND, callback=callback)
    assert seen == [(i, 5, SCHEDULE[i], SCHEDULE[i + 1]) for i in range(5)]
    sample(straight, start[:2], SCHEDULE, Euler(), cond=COND, callback=lambda step: kept.append(step.x.clone()))
    assert len(kept) == 5
    assert not torch.allclose(kept[0], kept[1])


def test_interrupted_run_goes_on_bit_equal(start):
    solver = solver_for(make_scheduler("dpm++"), SCHEDULE)
    x = start[:2].float()
    whole = sample(straight, x, SCHEDULE, solver, cond=COND)
    done = []
    half = sample(
        straight,
        x,
        SCHEDULE,
        solver,
        cond=COND,
        callback=lambda s: done.append(s),
        is_interrupted=lambda: len(done) > 2,
    )
    assert len(done) == 3
    again = sample(straight, half, SCHEDULE, solver, cond=COND, first_step=3)
    assert torch.equal(again.x, whole.x)
    assert not torch.equal(half.x, whole.x)


def test_stochastic_samples_do_not_depend_on_their_batch(start):
    x = start[:2].float()
    both = sample(straight, x, SCHEDULE, SDE(), cond=COND, generator=generators_for([1, 2])).x
    second = sample(straight, x[1:], SCHEDULE, SDE(), cond=COND[1:], generator=generators_for([2])).x
    assert torch.equal(both[1:], second)
    steps = {seed: [] for seed in (2, 3)}
    for seed, seen in steps.items():
        sample(straight, x, SCHEDULE, SDE(), cond=COND, generator=generators_for([1, seed]), callback=seen.append)
    first, other = steps[2][0].x, steps[3][0].x
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


def test_guidance_reaches_the_loop(start):
    uncond = Cond(label=torch.tensor([0.0, 0.0]))
    x = start[:2].float()
    end = sample(straight, x, uniform_schedule(1), Euler(), cond=COND, uncond=uncond, guidance=Guidance(3.0)).x
    assert torch.allclose(end, 3 * COND.label[:, None].expand(2, 5), atol=1e-5)


def test_bar_is_shown_on_the_error_stream_when_slow(monkeypatch, start):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    sample(straight, start[:2], SCHEDULE, Euler(), cond=COND)
    assert stream.getvalue() == ""
    monkeypatch.setattr(loop, "BAR_DELAY", 0.05)
    slow = lambda x, t, cond: (time.sleep(0.04), straight(x, t, cond))[1]  # noqa: E731
    sample(slow, start[:2], SCHEDULE, Euler(), cond=COND)
    assert "/5" in stream.getvalue()
    stream.truncate(0)
    sample(slow, start[:2], SCHEDULE, Euler(), cond=COND, progress=False)
    assert "/5" not in stream.getvalue()


def test_refuses(start):
    with pytest.raises(UserError, match="at least 2 times"):
        sample(straight, start, [1.0], Euler(), cond=COND)
    with pytest.raises(UserError, match="give a generator"):
        sample(straight, start, SCHEDULE, SDE(), cond=COND)
