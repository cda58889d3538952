import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.sampling.guidance import Autoguidance, Guidance, bind


class Labelled:
    """A denoiser whose velocity is its label, and which notes the size of its calls."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, cond):
        assert t.shape == (len(x),)
        self.rows.append(len(x))
        return cond.label[:, None].float().expand_as(x) * t[:, None]


COND, UNCOND = Cond(label=torch.tensor([3, 5])), Cond(label=torch.tensor([1, 1]))
X = torch.zeros(2, 4)


@pytest.mark.parametrize("is_batched", [True, False])
def test_formula_and_calls(is_batched):
    denoiser = Labelled()
    velocity = bind(denoiser, COND, UNCOND, Guidance(2.5, is_batched=is_batched))(X, 0.5)
    assert velocity[:, 0].tolist() == [0.5 * (1 + 2.5 * 2), 0.5 * (1 + 2.5 * 4)]
    assert denoiser.rows == ([4] if is_batched else [2, 2])


def test_outside_the_interval_only_the_conditional_branch_runs():
    denoiser = Labelled()
    bound = bind(denoiser, COND, UNCOND, Guidance(2.0, interval=(0.25, 0.75)))
    assert bound(X, 0.9)[:, 0].tolist() == pytest.approx([2.7, 4.5])
    assert bound(X, 0.5)[:, 0].tolist() == [0.5 * (1 + 2 * 2), 0.5 * (1 + 2 * 4)]
    bound(X, 0.25), bound(X, 0.2)
    assert denoiser.rows == [2, 4, 4, 2]


@pytest.mark.parametrize("is_batched", [True, False])
def test_samples_may_have_times_of_their_own(is_batched):
    bound = bind(Labelled(), COND, UNCOND, Guidance(2.0, interval=(0.25, 0.75), is_batched=is_batched))
    found = bound(X, torch.tensor([0.5, 0.9], dtype=torch.float64))
    assert found[:, 0].tolist() == pytest.approx([0.5 * (1 + 2 * 2), 0.9 * 5])
    assert torch.equal(bind(Labelled(), COND)(X, torch.tensor([0.5, 0.9]))[1], 0.9 * 5 * torch.ones(4))


def test_scale_of_one_is_the_conditional_branch_alone():
    denoiser = Labelled()
    assert torch.equal(bind(denoiser, COND, UNCOND, Guidance(1.0))(X, 0.5), bind(denoiser, COND)(X, 0.5))
    assert denoiser.rows == [2, 2]


def test_scale_of_zero_is_unconditional():
    assert torch.equal(bind(Labelled(), COND, UNCOND, Guidance(0.0))(X, 0.5), bind(Labelled(), UNCOND)(X, 0.5))


def test_refuses():
    with pytest.raises(UserError, match="unconditional branch"):
        bind(Labelled(), COND, None, Guidance(2.0))
    for scale, interval in ((-1.0, (0, 1)), (float("inf"), (0, 1)), (2.0, (0.8, 0.2)), (2.0, (0.0, 1.5))):
        with pytest.raises(UserError, match="choose"):
            Guidance(scale, interval)


def test_guidance_on_some_channels_leaves_the_others_to_the_condition():
    whole = bind(Labelled(), COND, UNCOND, Guidance(3.0))(X, 0.5)
    some = bind(Labelled(), COND, UNCOND, Guidance(3.0, channels=2))(X, 0.5)
    given = bind(Labelled(), COND)(X, 0.5)
    assert torch.equal(some[:, :2], whole[:, :2])
    assert torch.equal(some[:, 2:], given[:, 2:])
    assert torch.equal(bind(Labelled(), COND, UNCOND, Guidance(3.0, channels=4))(X, 0.5), whole)
    with pytest.raises(UserError, match="at least 1"):
        Guidance(2.0, channels=0)


class Constant:
    """A denoiser of one velocity for all channels but the last, which has another; it notes its calls."""

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self, x, t, cond):
        self.calls += 1
        return torch.cat([torch.full_like(x[:, :-1], self.value), torch.full_like(x[:, -1:], 2 * self.value)], 1)


def test_autoguidance_is_the_weak_one_plus_the_scaled_difference_in_all_channels():
    strong, weak = Constant(3.0), Constant(1.0)
    x = torch.zeros(2, 6, 2, 2)
    out = Autoguidance(weak, 1.42).around(strong)(x, torch.tensor([0.2, 0.9]), Cond())
    torch.testing.assert_close(out[:, :-1], torch.full_like(out[:, :-1], 1 + 1.42 * 2))
    torch.testing.assert_close(out[:, -1:], torch.full_like(out[:, -1:], 2 + 1.42 * 4))
    assert torch.equal(
        Autoguidance(weak, 1.0).around(strong)(x, torch.ones(2), Cond()), strong(x, torch.ones(2), Cond())
    )
    assert weak.calls == 1


def test_autoguidance_acts_within_its_interval_sample_by_sample_and_the_weak_one_rests_outside():
    strong, weak = Constant(3.0), Constant(1.0)
    guided = Autoguidance(weak, 2.0, (0.3, 0.6)).around(strong)
    x = torch.zeros(2, 2)
    out = guided(x, torch.tensor([0.5, 0.9]), Cond())
    assert out[:, 0].tolist() == [5.0, 3.0]
    guided(x, torch.tensor([0.1, 0.9]), Cond())
    assert weak.calls == 1
    with pytest.raises(UserError, match="scale"):
        Autoguidance(weak, float("nan"))


def test_autoguidance_and_guidance_by_conditions_add_up():
    strong = Autoguidance(Constant(0.0), 2.0).around(Labelled())
    velocity = bind(strong, COND, UNCOND, Guidance(2.5))(X, 0.5)
    assert velocity[:, 0].tolist() == [2 * 0.5 * (1 + 2.5 * 2), 2 * 0.5 * (1 + 2.5 * 4)]


def test_guidance_acts_on_all_channels():
    class Branch:
        def __call__(self, x, t, cond):
            return cond.label[:, None, None, None].float() * torch.arange(1, 7.0).view(1, 6, 1, 1).expand_as(x)

    x = torch.zeros(2, 6, 2, 2)
    out = bind(Branch(), COND, UNCOND, Guidance(2.0))(x, 0.5)
    torch.testing.assert_close(out[0, :, 0, 0], (1 + 2 * 2) * torch.arange(1, 7.0))
