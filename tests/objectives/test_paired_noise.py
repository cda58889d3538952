"""The same data and noise at an earlier time, by the formula that has the noise."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.seeds import generators_for
from smalti.core.time import interpolate
from smalti.objectives.paired_noise import StraightPairs


def drawn(t, **settings):
    torch.manual_seed(0)
    x0, noise = torch.randn(2, len(t), 3, 4, 4).unbind(0)
    pair = StraightPairs(**settings).draw(x0, interpolate(x0, noise, t), t, generators_for(range(len(t))))
    return x0, noise, pair


def test_data_and_noise_are_the_same_and_the_teacher_sees_less_noise():
    t = torch.linspace(0.01, 1, 50)
    x0, noise, pair = drawn(t)
    assert torch.allclose(pair.x, interpolate(x0, noise, pair.t), atol=1e-5)
    assert (pair.t <= t).all()
    assert (t - pair.t <= 0.2 + 1e-6).all()
    assert (pair.t[:10] == 0).any()  # clamped: these are the data
    assert (t - pair.t).std() > 0.03  # every sample has its own


def test_times_may_lie_at_the_very_end_of_the_path():
    x0, _, pair = drawn(torch.full((8,), 1e-6))
    assert torch.isfinite(pair.x).all()
    assert torch.allclose(pair.x, x0, atol=1e-4)


def test_the_control_has_other_noise_at_the_same_times():
    t = torch.full((8,), 0.9)
    _, noise, pair = drawn(t)
    x0, _, other = drawn(t, has_own_noise=True)
    assert torch.equal(pair.t, other.t)
    found = (other.x - (1 - other.t).view(-1, 1, 1, 1) * x0) / other.t.view(-1, 1, 1, 1)
    assert abs(torch.corrcoef(torch.stack([found.flatten(), noise.flatten()]))[0, 1]) < 0.2


def test_draws_do_not_depend_on_the_batch_and_tokens_may_have_times():
    t = torch.linspace(0.3, 0.9, 6)
    _, _, whole = drawn(t)
    x0 = torch.zeros(1, 3, 4, 4)
    alone = StraightPairs().draw(x0, x0, t[4:5], generators_for([4]))
    assert torch.equal(alone.t, whole.t[4:5])
    tokens = torch.rand(2, 5) * 0.5 + 0.5
    pair = StraightPairs().draw(torch.zeros(2, 5, 8), torch.ones(2, 5, 8), tokens, generators_for([0, 1]))
    moved = tokens - pair.t
    assert torch.allclose(moved, moved[:, :1].expand(-1, 5), atol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="above 0"):
        StraightPairs(largest=0)
