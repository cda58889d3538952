"""Stages on the same weights: what is carried over, what begins anew, and a run that was stopped."""

from dataclasses import replace

import pytest
import torch
from toy_training import ToyDenoiser, ToySource

from smalti.core.errors import UserError
from smalti.objectives.flow_matching import FlowMatching
from smalti.training import checkpoints
from smalti.training.config import TrainConfig
from smalti.training.stages import Stage, train_stages

CONFIG = TrainConfig(steps=6, batch=8, log_every=1, learning_rate=1e-2)


def stages(moments="kept", **second):
    return [
        Stage("one", FlowMatching(), CONFIG, ToySource()),
        Stage("two", FlowMatching(shift=2.0), replace(CONFIG, **{"steps": 4, "ema": 0.5, **second}), moments=moments),
    ]


def run(out, given=None, **options):
    torch.manual_seed(0)
    model = ToyDenoiser()
    return model, train_stages(model, given or stages(), out, **options)


def moments_of(folder):
    return checkpoints.load(checkpoints.latest(folder / "checkpoints")).tensors["optimizer"]


def test_the_second_stage_goes_on_from_the_trained_weights(tmp_path):
    """Not from the averaged ones, and not from the start."""
    run(tmp_path, stages(learning_rate=1e-12, weight_decay=0.0))
    first, second = (
        checkpoints.load(checkpoints.latest(tmp_path / name / "checkpoints")).tensors for name in ("1-one", "2-two")
    )
    for name, tensor in first["model"].items():
        torch.testing.assert_close(second["model"][name], tensor, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(second["ema"][name], tensor, atol=1e-6, rtol=1e-5)
    assert any((first["ema"][name] - tensor).abs().max() > 1e-4 for name, tensor in first["model"].items())


@pytest.mark.parametrize(("moments", "steps"), [("kept", 10), ("fresh", 4)])
def test_moments_are_kept_or_fresh(tmp_path, moments, steps):
    run(tmp_path, stages(moments))
    counts = {int(one) for name, one in moments_of(tmp_path / "2-two").items() if name.endswith("/step")}
    assert counts == {steps}


def test_every_stage_has_its_own_draws_and_objective(tmp_path):
    seen = []

    class Watched(FlowMatching):
        def loss(self, denoiser, batch, state, generator):
            result = super().loss(denoiser, batch, state, generator)
            seen.append((self.shift, batch.x0))
            return result

    one, two = stages()
    run(tmp_path, [replace(one, objective=Watched()), replace(two, objective=Watched(shift=2.0))])
    first, second = ([x for shift, x in seen if shift == wanted] for wanted in (1.0, 2.0))
    assert len(first) == 7  # one of them counts the cost
    assert len(second) == 5
    assert not torch.equal(first[1], second[1])


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "parts", stages()[:1])
    parts, report = run(tmp_path / "parts", resume=True)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), parts.parameters()))
    assert report.reports[0].seconds < 5
    with pytest.raises(UserError, match="resume"):
        run(tmp_path / "parts")


def test_the_report_says_what_each_stage_cost(tmp_path):
    told = []
    _, report = run(tmp_path, say=told.append)
    assert [one.samples for one in report.costs] == [48, 32]
    assert report.costs[0].flops / 48 == report.costs[1].flops / 32 > 0
    assert report.flops == sum(one.flops for one in report.costs)
    assert len(told) == 2
    assert len(report.table().splitlines()) == 4


def test_the_result_is_the_average_of_the_last_stage(tmp_path):
    model, report = run(tmp_path)
    assert report.averaged is not model
    model, report = run(tmp_path / "none", stages(ema=0.0))
    assert report.averaged is model


def test_lists_that_make_no_training_are_refused(tmp_path):
    one, two = stages()
    for given in ([two], [one, one]):
        with pytest.raises(UserError, match="stages"):
            run(tmp_path, given)
    with pytest.raises(UserError, match="moments"):
        Stage("one", FlowMatching(), CONFIG, moments="half")
