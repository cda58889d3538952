import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from smalti.core.errors import UserError
from smalti.sampling.shift import shift_for_tokens, shift_time, uniform_schedule


def test_shift_keeps_the_ends_and_inverts():
    for shift in (0.3, 1.0, 3.0):
        assert (shift_time(0.0, shift), shift_time(1.0, shift)) == (0.0, 1.0)
        assert shift_time(shift_time(0.37, shift), 1 / shift) == pytest.approx(0.37)
    assert shift_time(0.5, 3.0) == 0.75
    assert shift_time(0.37, 1.0) == 0.37


def test_shift_equals_the_scheduler_of_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=uniform_schedule(7)[:-1])
    assert theirs.sigmas.tolist() == pytest.approx(uniform_schedule(7, shift=3.0))


def test_schedule_falls_and_may_rise():
    schedule = uniform_schedule(28, shift=2.0)
    assert (len(schedule), schedule[0], schedule[-1]) == (29, 1.0, 0.0)
    assert schedule == sorted(schedule, reverse=True)
    assert uniform_schedule(4, start=0.0, end=1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert uniform_schedule(2, start=0.5) == [0.5, 0.25, 0.0]


def test_shift_follows_the_side():
    assert shift_for_tokens(256, 256, 1.7) == 1.7
    assert shift_for_tokens(1024, 256) == 2.0


@pytest.mark.parametrize("arguments", [(0,), (-3,), (2.5,), (True,), (4, 0.0), (4, float("nan")), (4, 1.0, 1.2)])
def test_refuses(arguments):
    with pytest.raises(UserError, match="choose"):
        uniform_schedule(*arguments)
    with pytest.raises(UserError, match="at least 1"):
        shift_for_tokens(0, 4)
