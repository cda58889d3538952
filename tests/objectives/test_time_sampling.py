import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.seeds import generators_for
from smalti.objectives.time_sampling import (
    LogitNormal,
    Shifted,
    Uniform,
    dimension_shift,
    sample_times,
    shift_time,
)
from smalti.sampling.shift import uniform_schedule


def draw(distribution, count=4000, strata=1):
    return sample_times(distribution, generators_for(range(count)), torch.arange(count), strata)


def test_logit_normal_has_its_mean_and_spread():
    z = torch.logit(draw(LogitNormal(-0.5, 0.8)).double())
    assert z.mean().item() == pytest.approx(-0.5, abs=0.04)
    assert z.std().item() == pytest.approx(0.8, abs=0.04)


def test_uniform_is_flat():
    t = draw(Uniform())
    counts = torch.histc(t, 10, 0, 1)
    assert counts.min() > 320
    assert counts.max() < 480


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_shift_keeps_the_ends_moves_the_middle_and_has_an_inverse(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    moved = shift_time(t, shift)
    assert moved[0] == 0
    assert moved[-1] == pytest.approx(1)
    assert moved[50].item() == pytest.approx(shift / (1 + shift))
    assert (moved.diff() > 0).all()
    torch.testing.assert_close(shift_time(moved, 1 / shift), t)


def test_shifted_distribution_is_the_shift_of_its_base():
    torch.testing.assert_close(draw(Shifted(Uniform(), 2.0), 50), shift_time(draw(Uniform(), 50), 2.0))


def test_strata_hold_one_time_each():
    t = draw(Uniform(), 64, strata=16)
    for batch in t.split(16):
        assert sorted((batch * 16).long().tolist()) == list(range(16))
    assert len(set((draw(Uniform(), 16) * 16).long().tolist())) < 16


@pytest.mark.parametrize("strata", [1, 8])
def test_times_do_not_depend_on_the_split(strata):
    ids = torch.arange(5, 29)
    whole = sample_times(LogitNormal(), generators_for(range(24)), ids, strata)
    parts = [
        sample_times(LogitNormal(), generators_for(range(i, i + 3)), ids[i : i + 3], strata) for i in range(0, 24, 3)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_times_stay_inside_the_open_interval():
    t = draw(LogitNormal(0.0, 100.0))
    assert t.min() > 0
    assert t.max() < 1
    assert t.dtype == torch.float32


@pytest.mark.parametrize(
    "make", [lambda: LogitNormal(0, 0), lambda: LogitNormal(float("nan"), 1), lambda: Shifted(Uniform(), 0)]
)
def test_bad_parameters_are_refused(make):
    with pytest.raises(UserError):
        make()


def test_the_shift_for_many_numbers_is_the_papers_and_never_below_one():
    assert dimension_shift((768, 16, 16)) == pytest.approx(6.93, abs=0.01)
    assert dimension_shift((192, 8, 8)) == pytest.approx(1.732, abs=1e-3)
    assert dimension_shift((4, 32, 32)) == 1.0
    assert dimension_shift((16, 8, 8)) == 1.0


def test_the_shift_for_many_numbers_moves_training_and_sampling_towards_noise_alike():
    shift = dimension_shift((768, 16, 16))
    trained = sample_times(Shifted(Uniform(), shift), generators_for(range(400)), torch.arange(400), strata=400)
    assert trained.mean() > 0.7  # 1 is noise
    grid = torch.tensor(uniform_schedule(400, shift)[1:-1])
    torch.testing.assert_close(grid.flip(0), trained.sort().values[1:], atol=0.02, rtol=0.0)
