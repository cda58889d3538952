import pytest
import torch

from smalti.core.errors import UserError
from smalti.sampling.dopri5 import Dopri5
from smalti.sampling.keep_known import KeepKnown, paste
from smalti.sampling.loop import sample
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import Euler

MASK = torch.zeros(2, 1, 4, 4)
MASK[:, :, :, 2:] = 1
KNOWN, NOISE = torch.full((2, 3, 4, 4), 0.5), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def surroundings(x, t, cond):
    """Draws everywhere what it sees on the left."""
    t = t.reshape(-1, 1, 1, 1)
    x0 = (x[..., :2] - t * NOISE[..., :2]).mean((2, 3), keepdim=True) / (1 - t).clamp_min(1e-3)
    return (x - x0) / t.clamp_min(1e-3)


@pytest.mark.parametrize("solver", [Euler(), Dopri5(1e-3, 1e-3)])
def test_known_places_are_exact_and_lead_the_others(solver):
    seen = []
    keep = KeepKnown(KNOWN, NOISE, MASK)

    def callback(step):
        seen.append((step.s, keep(step)))
        return seen[-1][1]

    drawn = sample(surroundings, NOISE, uniform_schedule(8), solver, callback=callback).x
    assert torch.equal(drawn[..., :2], KNOWN[..., :2])
    for s, x in seen:
        torch.testing.assert_close(x[..., :2], ((1 - s) * KNOWN + s * NOISE)[..., :2])
    torch.testing.assert_close(drawn[..., 2:], KNOWN[..., 2:], atol=0.05, rtol=0)
    free = sample(surroundings, NOISE, uniform_schedule(8), Euler()).x
    assert not torch.equal(free[..., :2], KNOWN[..., :2])


def test_paste_is_exact_outside_and_refuses_what_does_not_fit():
    drawn = torch.randn(2, 3, 4, 4)
    found = paste(drawn, KNOWN, MASK)
    assert torch.equal(found[..., :2], KNOWN[..., :2])
    assert torch.equal(found[..., 2:], drawn[..., 2:])
    with pytest.raises(UserError, match="equal shapes"):
        paste(drawn, KNOWN[:, :1], MASK)
    with pytest.raises(UserError, match="round it"):
        paste(drawn, KNOWN, MASK * 0.5)
