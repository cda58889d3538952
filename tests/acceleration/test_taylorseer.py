from itertools import pairwise

import pytest
import torch

import smalti
from smalti.acceleration.taylorseer import TaylorSeer, spread_places
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal, UserError
from smalti.core.method import Moment
from smalti.core.protocols import Cond


def schedule(method, evaluations=14, steps=None):
    """Which evaluations are full."""
    memory, full = method.init(), []
    for index in range(evaluations):
        method._decide(memory, Moment(index, index, 1 - index / evaluations, steps))
        full += [index] if memory.is_full else []
    return full


def test_warm_up_then_one_in_interval():
    assert schedule(TaylorSeer(4, warmup=3)) == [0, 1, 2, 6, 10]
    assert schedule(TaylorSeer(3, warmup=1)) == [0, 3, 6, 9, 12]
    assert schedule(TaylorSeer(1, warmup=1)) == list(range(14))
    assert schedule(TaylorSeer(4, warmup=3, last_full=2), steps=14) == [0, 1, 2, 6, 10, 12, 13]
    assert len(schedule(TaylorSeer(4, warmup=3), 50)) == 14  # 3.57 times fewer, as published for N = 4


def test_last_full_needs_the_number_of_steps():
    with pytest.raises(Refusal, match="need their number"):
        schedule(TaylorSeer(last_full=1))


@pytest.mark.parametrize(
    "settings", [{"interval": 0}, {"order": -1}, {"warmup": 0}, {"store": "int8"}, {"differences": "newton"}]
)
def test_bad_settings_are_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        TaylorSeer(**settings)
    assert "\n" not in str(error.value)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MMDiT.tiny().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


COND = Cond(text=torch.ones(1, 5, 12), pooled=torch.ones(1, 10))


@torch.no_grad()
def walk(model, method, steps=12, times=None):
    """The velocities along a fixed path, which does not depend on them."""
    outputs = []
    times = torch.linspace(1, 0.05, steps).tolist() if times is None else times
    with smalti.apply(model, method) as handle:
        for t in times:
            x = torch.full((1, 4, 4, 6), 1.0) * (1 + t)
            outputs.append(model(x, torch.tensor([t]), COND))
        kept = handle.report().methods[0].kept
        handle.remove(check=False)
    return outputs, kept


def test_errors_fall_with_the_order_on_a_smooth_path(model):
    times = torch.linspace(0.5, 0.495, 40).tolist()  # random weights are smooth in time over short stretches alone
    exact, _ = walk(model, TaylorSeer(1), times=times)
    errors = []
    for order in (0, 1, 2):
        outputs, _ = walk(model, TaylorSeer(4, order, 3), times=times)
        errors.append(sum((one - other).norm().item() for one, other in zip(outputs, exact, strict=True)))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]


def test_gates_follow_the_current_time(model):
    """With reuse alone, forecast evaluations at two times differ by their gates; a series of gate times output would
    repeat the last one exactly."""
    outputs, _ = walk(model, TaylorSeer(9, 0, 1), 3)
    assert not torch.equal(outputs[1], outputs[2])
    lite, _ = walk(model, TaylorSeer(9, 0, 1, lite=True), 3)
    assert torch.equal(lite[1], lite[2])
    assert torch.equal(lite[0], lite[1])


def test_memory_is_counted_and_lite_keeps_a_fraction(model):
    tokens, width = 6 + 5, 16  # 2 x 3 image and 5 text tokens
    sublayers = 2 + 1 + 1  # attention and ffn of the double block, their sum in two single blocks
    _, kept = walk(model, TaylorSeer(4, 1, 3))
    assert kept == 2 * sublayers * tokens * width * 4  # two factors of 4 bytes
    assert walk(model, TaylorSeer(4, 2, 3))[1] == kept * 3 // 2
    assert walk(model, TaylorSeer(4, 1, 3, store="bf16"))[1] == kept // 2
    assert walk(model, TaylorSeer(4, 1, 3, lite=True))[1] == 2 * 4 * 4 * 6 * 4


def test_the_first_interval_after_a_warm_up_of_one_is_reuse(model):
    reuse, _ = walk(model, TaylorSeer(3, 0, 1), 4)
    first, _ = walk(model, TaylorSeer(3, 2, 1), 4)
    assert torch.equal(reuse[2], first[2])


def test_time_as_abscissa_matters_on_uneven_steps(model):
    times = [1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.3, 0.1]
    by_index, _ = walk(model, TaylorSeer(3, 1, 2), times=times)
    by_time, _ = walk(model, TaylorSeer(3, 1, 2, abscissa="time"), times=times)
    assert torch.equal(by_index[0], by_time[0])
    assert not torch.equal(by_index[3], by_time[3])


def test_full_evaluations_can_be_named():
    assert schedule(TaylorSeer(full_at=(0, 1, 4, 9)), 12) == [0, 1, 4, 9]
    assert schedule(TaylorSeer(full_at=(0, 1, 4), last_full=1), 12, 12) == [0, 1, 4, 11]
    for places in ((1, 3), (0, 3, 2), (0, 2, 2)):
        with pytest.raises(UserError, match="rising indices"):
            TaylorSeer(full_at=places)
    with pytest.raises(UserError, match="in place of interval and warmup"):
        TaylorSeer(interval=2, full_at=(0, 1, 4))


@pytest.mark.parametrize(("count", "steps", "bend"), [(8, 28, 1.0), (9, 28, 1.6), (27, 28, 2.0), (3, 50, 0.7)])
def test_places_are_spread_from_the_first_to_the_last(count, steps, bend):
    places = spread_places(count, steps, bend)
    assert (len(set(places)), places[0], places[-1]) == (count, 0, steps - 1)
    assert list(places) == sorted(places)
    gaps = [after - before for before, after in pairwise(places)]
    assert bend < 1 or gaps[0] <= gaps[-1]


def test_candidates_for_a_planner_cost_about_what_is_asked():
    for one in TaylorSeer.candidates(28, 3.0):
        full = len(one.full_at or schedule(one, 28))
        assert 6 <= full <= 10
    assert TaylorSeer.candidates(4, 3.0)
