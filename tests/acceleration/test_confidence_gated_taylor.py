import pytest
import torch

import smalti
from smalti.acceleration.confidence_gated_taylor import ConfidenceGatedTaylor, relative_error
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.core.method import BlockCall, Moment, Site
from smalti.core.protocols import Cond

LINE = [1 + 0.1 * k for k in range(12)]
CURVE = [1 + 0.02 * k * k for k in range(12)]
ALWAYS = 1e9


def drive(method, firsts, lasts=None, steps=None):
    """Three blocks whose first and last outputs are given numbers: what came out, the blocks that ran, the state."""
    state, outputs, ran = method.init(), [], []
    for index, (first, last) in enumerate(zip(firsts, lasts or firsts, strict=True)):
        streams = {"image": torch.zeros(2, 3, 4)}
        for depth, value in enumerate((first, 50.0, last)):

            def run(given, value=value, place=(index, depth)):
                ran.append(place)
                return {"image": torch.as_tensor(value).expand(2, 3, 4) + 0 * given["image"]}

            call = BlockCall(
                Moment(index, index, 1 - index / 20, steps), Site("blocks", depth, "", "block", depth), streams, run,
                lambda event: None,
            )  # fmt: skip
            streams = method.at_block(state, call)
        outputs.append(streams["image"][0, 0, 0].item())
    return outputs, ran, state


def full(state):
    return [index for index, is_full in enumerate(state.trace.full) if is_full]


def test_the_probe_is_held_against_its_forecast_and_not_against_the_last_output():
    _, _, state = drive(ConfidenceGatedTaylor(tau=0.01, probe_order=1), LINE)
    assert full(state) == [0, 1, 2]  # features that move along a line keep the gate open
    _, _, repeated = drive(ConfidenceGatedTaylor(tau=0.01, probe_order=0), LINE)
    assert full(repeated) == list(range(12))  # First-Block-Cache closes it


def test_a_forecast_is_the_targets_series_and_costs_one_block():
    outputs, ran, state = drive(ConfidenceGatedTaylor(tau=ALWAYS), LINE, [10 + 3.0 * k for k in range(12)])
    assert outputs == pytest.approx([10 + 3.0 * k for k in range(12)])
    assert ran == [(index, depth) for index in range(3) for depth in range(3)] + [(index, 0) for index in range(3, 12)]
    assert state.trace.skipped == pytest.approx(9 / 12)
    assert state.trace.speedup == pytest.approx(12 * 3 / len(ran))


def test_the_probe_is_renewed_only_where_the_target_is():
    """The gap grows until the gate closes; a probe renewed in every step would see a gap of one and keep it open."""
    method = ConfidenceGatedTaylor(tau=0.11, order=1, probe_order=1)
    _, _, state = drive(method, CURVE)
    errors = state.trace.errors
    assert full(state) == [0, 1, 2, 5, 8]
    assert errors[3] < errors[4] < 0.11 < errors[5]
    assert state.probe.places == state.target["image"].places == [8, 5]


def test_distances_are_to_the_last_full_evaluation():
    outputs, _, _ = drive(ConfidenceGatedTaylor(order=1, forced=(3, 5, 6)), LINE[:7], CURVE[:7])
    slope = (CURVE[4] - CURVE[2]) / 2  # evaluation 3 was forecast and left no trace
    assert outputs[5:] == pytest.approx([CURVE[4] + slope, CURVE[4] + 2 * slope])


def test_first_evaluations_and_the_last_step_are_full_and_not_asked():
    _, _, state = drive(ConfidenceGatedTaylor(tau=ALWAYS, warmup=4), LINE, steps=12)
    assert full(state) == [0, 1, 2, 3, 11]
    assert [index for index, error in enumerate(state.trace.errors) if error is None] == [0, 1, 2, 3, 11]
    _, _, unknown = drive(ConfidenceGatedTaylor(tau=ALWAYS, warmup=4), LINE)
    assert full(unknown) == [0, 1, 2, 3]


def test_a_limit_of_forecasts_in_a_row():
    _, _, state = drive(ConfidenceGatedTaylor(tau=ALWAYS, max_skip=2), LINE)
    assert full(state) == [0, 1, 2, 5, 8, 11]


def test_a_forced_mask_is_kept_whatever_the_probe_says():
    wild = [1.0, 5.0, -3.0, 8.0, 0.1, 9.0, -7.0]
    _, _, state = drive(ConfidenceGatedTaylor(tau=0, forced=(3, 4, 6)), wild)
    assert full(state) == [0, 1, 2, 5]
    assert state.trace.errors[3] > 1  # measured nevertheless


def test_the_worst_sample_can_decide():
    truth, forecast = torch.ones(10, 3, 4), torch.ones(10, 3, 4)
    forecast[7] += 0.5
    assert relative_error(forecast, truth, "mean") == pytest.approx(0.05)
    assert relative_error(forecast, truth, "max") == pytest.approx(0.5)

    def values(k):
        one = torch.ones(2, 1, 1)
        one[1] += CURVE[k] - 1
        return one

    path = [values(k) for k in range(8)]
    _, _, by_mean = drive(ConfidenceGatedTaylor(tau=0.04, probe_order=1), path)
    _, _, by_worst = drive(ConfidenceGatedTaylor(tau=0.04, probe_order=1, reduction="max"), path)
    assert len(full(by_mean)) < len(full(by_worst))


def test_a_step_reads_one_number(monkeypatch):
    reads = []
    item = torch.Tensor.item
    outside = ConfidenceGatedTaylor(tau=0.05, probe_order=1)
    monkeypatch.setattr(torch.Tensor, "item", lambda one: reads.append(1) or item(one))
    _, _, state = drive(outside, CURVE)
    asked = sum(error is not None for error in state.trace.errors)
    assert len(reads) - len(CURVE) == asked == 9  # the loop itself reads each output once


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MMDiT.tiny().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


COND = Cond(text=torch.ones(1, 5, 12), pooled=torch.ones(1, 10))
OTHER = Cond(text=-torch.ones(1, 5, 12), pooled=torch.ones(1, 10))


@torch.no_grad()
def walk(model, method, steps=20, conds=(COND,)):
    """The velocities along a short fixed path, which does not depend on them."""
    outputs = []
    with smalti.apply(model, method) as handle:
        for t in torch.linspace(0.5, 0.48, steps).tolist():
            outputs += [model(torch.full((1, 4, 4, 6), 1 + t), torch.tensor([t]), cond) for cond in conds]
        report = handle.report().methods[0]
        handle.remove(check=False)
    return outputs, report


def test_error_is_bounded_without_a_gate_and_falls_with_it(model):
    exact, _ = walk(model, ConfidenceGatedTaylor.neutral())
    errors = []
    for tau in (ALWAYS, 0.05):
        method = ConfidenceGatedTaylor(tau=tau)
        outputs, _ = walk(model, method)
        errors.append(sum((one - other).norm().item() for one, other in zip(outputs, exact, strict=True)))
        assert 0 < method.traces[0].skipped < 1
    assert errors[1] < 0.5 * errors[0]


def test_what_follows_the_blocks_knows_the_current_time(model):
    outputs, _ = walk(model, ConfidenceGatedTaylor(order=0, forced=(3, 4)), 5)
    assert not torch.equal(outputs[3], outputs[4])


def test_memory_is_a_tensor_for_each_order_and_two(model):
    _, report = walk(model, ConfidenceGatedTaylor(tau=ALWAYS, order=1, probe_order=2))
    image, joint, width = 6, 6 + 5, 16
    assert report.kept == (3 * image + 2 * joint) * width * 4
    assert walk(model, TaylorSeer(4, 1, 3))[1].kept == 2 * 4 * joint * width * 4  # 2 orders, 4 sublayers


def test_branches_decide_for_themselves(model):
    method = ConfidenceGatedTaylor(tau=0.02)
    both, report = walk(model, method, conds=(COND, OTHER))
    one, other = method.traces
    assert one.full != other.full
    assert report.events["forecast"] == 40 - sum(one.full) - sum(other.full)
    alone, _ = walk(model, ConfidenceGatedTaylor(tau=0.02), conds=(OTHER,))
    assert all(torch.equal(*pair) for pair in zip(both[1::2], alone, strict=True))


def test_every_run_begins_full(model):
    method = ConfidenceGatedTaylor(tau=ALWAYS)
    with smalti.apply(model, method) as handle, torch.no_grad():
        for _ in range(2):
            with handle.run(steps=6):
                for t in (0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
                    model(torch.ones(1, 4, 4, 6), torch.tensor([t]), COND)
    assert [trace.full for trace in method.traces] == 2 * [[True] * 3 + [False] * 2 + [True]]


def test_few_steps_gain_nothing_and_it_says_so(model):
    with (
        pytest.raises(NeverEngaged, match=r"never forecast better than to 0\.\d+, and tau is 0\.001; with few steps"),
        smalti.apply(model, ConfidenceGatedTaylor(tau=0.001, warmup=2)),
        torch.no_grad(),
    ):
        for t in (1.0, 0.6, 0.3, 0.1):
            model(torch.full((1, 4, 4, 6), 1 + t), torch.tensor([t]), COND)
    with (
        pytest.raises(NeverEngaged, match="no more than warm-up"),
        smalti.apply(model, ConfidenceGatedTaylor()),
        torch.no_grad(),
    ):
        model(torch.ones(1, 4, 4, 6), torch.tensor([0.5]), COND)


def test_a_model_of_one_block_and_other_caches_are_refused(model):
    single = MMDiT(num_double=0, num_single=1)
    with pytest.raises(Refusal, match="single block"):
        smalti.apply(single, ConfidenceGatedTaylor())
    with pytest.raises(Refusal, match="both decide sublayer outputs"):
        smalti.apply(model, ConfidenceGatedTaylor(), TaylorSeer())


@pytest.mark.parametrize(
    "settings",
    [{"tau": -1}, {"tau": float("nan")}, {"order": -1}, {"warmup": 1}, {"max_skip": 0}, {"reduction": "median"},
     {"forced": (2, 5)}],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        ConfidenceGatedTaylor(**settings)
    assert "\n" not in str(error.value)
