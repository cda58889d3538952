import random

import numpy as np
import pytest
import torch
from torch import nn
from toy_training import ToyDenoiser

from smalti.core.errors import UserError
from smalti.objectives.flow_matching import FlowMatching
from smalti.training import checkpoints
from smalti.training.config import TrainConfig
from smalti.training.ema import EMA
from smalti.training.optimizers import Optimizers
from smalti.training.run_state import RunState, check_identity, check_weights, identity, plain, weights

CONFIG = TrainConfig(steps=10, batch=4)


def make(ema=True, **model_settings):
    model = ToyDenoiser(**model_settings)
    return RunState(model, EMA(model, 0.9) if ema else None, Optimizers(model, CONFIG))


def about(model, objective=None, config=CONFIG, **description):
    return identity(model, objective or FlowMatching(), config, description)


def test_global_generators_go_on_where_they_were(tmp_path):
    state = make()
    for draw in (random.random, np.random.rand, lambda: torch.rand(3)):
        draw()
    random.gauss(0, 1)
    np.random.randn()
    path = checkpoints.save(tmp_path, state.capture({}, 0), 1)
    expected = random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(2)
    state.restore(checkpoints.load(path), {})
    again = random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(2)
    assert expected[:3] == again[:3]
    assert torch.equal(expected[3], again[3])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": TrainConfig(steps=10, batch=4, learning_rate=5e-4)}, "config.learning_rate was 0.001, is 0.0005"),
        ({"objective": FlowMatching(shift=2.0)}, "objective.shift was 1.0, is 2.0"),
        ({"recipe": "other"}, "description.recipe was 'mine', is 'other'"),
    ],
)
def test_another_training_is_refused_by_the_setting_that_differs(change, named):
    model = ToyDenoiser()
    stored = about(model, recipe="mine")
    check_identity(stored, about(ToyDenoiser(), recipe="mine"))
    with pytest.raises(UserError, match=named.replace(".", r"\.")) as error:
        check_identity(stored, about(model, **{"recipe": "mine", **change}))
    assert "\n" not in str(error.value)


def test_another_model_is_refused_by_its_config_before_anything_is_changed(tmp_path):
    small, large = make(width=16), make(width=32)
    stored = checkpoints.load(checkpoints.save(tmp_path, small.capture(about(small.model), 0), 1))
    before = {key: value.clone() for key, value in weights(large.model).items()}
    with pytest.raises(UserError, match=r"model\.width was 16, is 32"):
        large.restore(stored, about(large.model))
    assert all(torch.equal(before[key], value) for key, value in weights(large.model).items())


def test_missing_extra_and_misshapen_weights_are_refused():
    expected = weights(ToyDenoiser())
    with pytest.raises(UserError, match=r"1 missing keys \(enter.weight\) and 1 extra keys \(more\)"):
        check_weights(
            {**{k: v for k, v in expected.items() if k != "enter.weight"}, "more": torch.ones(1)}, expected, "it"
        )
    with pytest.raises(UserError, match=r"enter.weight of shape \(3, 2\), not \(32, 5\)"):
        check_weights({**expected, "enter.weight": torch.ones(3, 2)}, expected, "it")


def test_a_checkpoint_without_an_average_is_refused_when_one_is_kept(tmp_path):
    without, having = make(ema=False), make()
    path = checkpoints.save(tmp_path, without.capture({}, 0), 1)
    with pytest.raises(UserError, match=r"averaged model has .* missing keys"):
        having.restore(checkpoints.load(path), {})


def test_tied_weights_are_stored_once(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    state = RunState(model, None, Optimizers(model, CONFIG))
    path = checkpoints.save(tmp_path, state.capture({}, 0), 1)
    value = model["a"].weight.detach().clone()
    nn.init.zeros_(model["a"].weight)
    state.restore(checkpoints.load(path), {})
    assert torch.equal(model["b"].weight, value)


def test_settings_become_json():
    assert plain({"f": test_settings_become_json, "t": (1, 2.5), "n": None, "o": FlowMatching()}) == {
        "f": "test_settings_become_json",
        "t": [1, 2.5],
        "n": None,
        "o": {
            "class": "FlowMatching", "time": {"class": "LogitNormal", "mean": 0.0, "std": 1.0}, "shift": 1.0,
            "target": "velocity", "weight": None, "strata": 1, "floor": 0.0,
        },
    }  # fmt: skip
