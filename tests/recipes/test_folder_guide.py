"""What is chosen for a time, and what is expected of it."""

import math
from dataclasses import replace

import pytest

from smalti.core.errors import UserError
from smalti.recipes.folder import PRESETS
from smalti.recipes.folder_guide import (
    COOLDOWN,
    FADE,
    LATE,
    SLOPES,
    TUNED_RATE,
    Choice,
    Machine,
    choose,
    forecast,
    recipe_for,
    shape,
    shift_of,
)

MACHINE = Machine("cpu", {64: 0.005, 128: 0.01, 256: 0.03}, {64: 500_000, 128: 2_000_000, 256: 9_000_000}, 64, 20, 1000)


def test_more_time_trains_a_wider_model():
    widths = [choose(MACHINE, minutes * 60).width for minutes in (2, 30, 600)]
    assert widths == [64, 128, 256]
    long = choose(MACHINE, 36_000)
    assert long.images * 0.03 == pytest.approx(36_000 - 20 - 30, rel=0.01)
    assert long.seconds == pytest.approx(long.images * 0.03)


def test_batches_grow_with_the_images_and_rates_with_the_root_of_the_batch():
    short, long = choose(MACHINE, 200), choose(MACHINE, 36_000)
    assert (short.batch, long.batch) == (16, 256)
    assert short.rate == pytest.approx(TUNED_RATE * math.sqrt(0.5))
    assert long.rate / short.rate == pytest.approx(4)
    assert choose(replace(MACHINE, seconds={64: 0.005}), 36_000).width == 64


def test_too_little_time_is_refused_in_one_line():
    with pytest.raises(UserError, match="give a larger --budget"):
        choose(MACHINE, 26)
    with pytest.raises(UserError, match="0 s are left"):
        choose(MACHINE, 5)


@pytest.mark.parametrize(("given", "first"), [(0.15, 0.15), (0.3, 0.3), (0.9, SLOPES[1]), (0.0, SLOPES[0])])
def test_the_forecast_begins_as_the_trial_went_and_fades_to_the_later_slope(given, first):
    images = [100.0 * (one + 1) for one in range(40)]
    losses = [2 * one**-given for one in images]
    reached = last = sum(images[-10:]) / 10
    expected, late = COOLDOWN * sum(losses[-10:]) / 10, min(first, LATE)
    for number in range(1, 2001):  # the slope, step by step
        here = reached * (1e5 / reached) ** (number / 2000)
        expected *= (here / last) ** -(late + (first - late) * (here / reached) ** -FADE)
        last = here
    assert forecast(images, losses, 1e5) == pytest.approx(expected, rel=0.01)
    assert forecast(images, losses, 100) == pytest.approx(sum(losses[-10:]) / 10)
    with pytest.raises(UserError, match="says nothing"):
        forecast(images[:3], losses[:3], 1e5)


def test_pictures_that_are_seen_often_are_shifted():
    assert shift_of(500, 10_000, 64) == 0
    assert shift_of(500, 10_001, 64) == 2
    assert recipe_for(PRESETS["cpu"], Choice(64, 16, 100, 1e-3, 60.0, shift=2), "cpu", True).shift == 2


def test_the_recipe_has_what_was_chosen_and_keeps_what_was_set():
    given = replace(PRESETS["cpu"], transformer={"ffn_ratio": 2})
    chosen = recipe_for(given, Choice(384, 64, 1000, 1e-3, 600.0), "cpu", True)
    assert chosen.transformer == {"heads": 12, "head_dim": 32, "num_double": 3, "num_single": 9, "ffn_ratio": 2}
    assert (chosen.training.steps, chosen.training.batch, chosen.training.learning_rate) == (1000, 64, 1e-3)
    assert (chosen.tuned_width, chosen.training.precision, chosen.training.minutes) == (192, "no", 10.5)
    assert recipe_for(given, Choice(64, 16, 60, 1e-3, 60.0), "cuda", False).training.precision == "bf16"
    assert shape(64, False) == {"heads": 2, "head_dim": 32, "depth": 6}
