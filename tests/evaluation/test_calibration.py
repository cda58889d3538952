"""Bisection meets what can be met and says what cannot; a cache on a model is calibrated by one call."""

import math

import pytest
import torch

from smalti.acceleration.confidence_gated_taylor import ConfidenceGatedTaylor
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.errors import UserError
from smalti.evaluation.calibration import accelerated, calibrate, find_threshold
from smalti.zoo.loader import load_model


@pytest.mark.parametrize("target", [0.02, 0.3, 0.9])
def test_a_smooth_curve_is_met_from_either_side(target):
    rising = find_threshold(lambda x: 1 - math.exp(-3 * x), target, (1e-4, 10), within=0.01, trials=20)
    assert rising.is_met
    assert 1 - math.exp(-3 * rising.threshold) == rising.value == pytest.approx(target, rel=0.01)
    falling = find_threshold(lambda x: math.exp(-3 * x), target, (1e-4, 10), within=0.01, trials=20, rises=False)
    assert math.exp(-3 * falling.threshold) == falling.value == pytest.approx(target, rel=0.01)


def test_trials_are_bounded_and_the_nearest_is_kept():
    calls = []
    found = find_threshold(lambda x: calls.append(x) or float(x > 0.5), 0.4, (0.01, 10), trials=7)
    assert not found.is_met
    assert (found.value, len(calls), len(found.tried)) == (0.0, 7, 7)
    assert find_threshold(lambda x: x, 0.1, (0.01, 1.0)).tried == ((pytest.approx(0.1), pytest.approx(0.1)),)


@pytest.fixture(scope="module")
def pipe():
    pipe = load_model("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


SETTINGS = {"num_inference_steps": 16, "guidance_scale": 1.0}
PROMPTS = ["a green apple", "panda"]


@pytest.mark.parametrize("target", [{"skip": 0.4}, {"distance": 0.05}, {"psnr": 30.0}])
def test_a_target_is_met_on_a_model(pipe, target):
    found = calibrate(pipe, ConfidenceGatedTaylor, PROMPTS, **target, between=(0.01, 1), within=0.2, **SETTINGS)
    assert found.is_met
    assert found.value == pytest.approx(*target.values(), rel=0.2)
    assert len(found.tried) <= 12


def test_what_cannot_be_met_is_said(pipe):
    with pytest.raises(UserError, match=r"gives a skip of 0\.9: the nearest of 2 tried is 0\.\d+"):
        calibrate(pipe, ConfidenceGatedTaylor, PROMPTS[:1], skip=0.9, trials=2, **SETTINGS)


def test_a_run_that_never_engages_is_the_full_one(pipe):
    def draw():
        return pipe("panda", generator=torch.Generator().manual_seed(0), output_type="latent", **SETTINGS).images

    full = draw()
    run = accelerated(pipe, ConfidenceGatedTaylor(tau=1e-6), [draw], [full])
    assert (run.skipped, run.distances, run.psnr) == (0, (0,), (math.inf,))
    with pytest.raises(UserError, match="several events in a model call"):
        accelerated(pipe, TaylorSeer(3), [draw], [full])


@pytest.mark.parametrize("targets", [{}, {"skip": 0.5, "psnr": 30}, {"skip": 0}])
def test_one_target_is_asked_for(pipe, targets):
    with pytest.raises(UserError, match="give one target above 0"):
        calibrate(pipe, ConfidenceGatedTaylor, PROMPTS, **targets)


@pytest.mark.parametrize("between", [(0, 1), (2, 1)])
def test_thresholds_are_above_0_and_in_order(between):
    with pytest.raises(UserError, match="give 0 < low < high"):
        find_threshold(float, 1, between)
