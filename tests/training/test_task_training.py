"""Trainings of tasks: together with mixed batches, or one after the other; nobody forgets and the model stays."""

from dataclasses import replace

import pytest
import torch
from task_toys import Flat, bank_of, inputs

from smalti.core.errors import UserError
from smalti.core.seeds import generators_for
from smalti.objectives.flow_matching import FlowMatching
from smalti.training.config import TrainConfig
from smalti.training.task_training import JointSource, train_in_turn, train_together

CONFIG = TrainConfig(steps=60, batch=8, learning_rate=2e-2, weight_decay=0.1, ema=0.5, log_every=5)
LEVELS = {"low": -2.0, "high": 2.0}


def ready():
    return bank_of(*LEVELS, filled=False), {name: Flat(level) for name, level in LEVELS.items()}


@torch.no_grad()
def error(bank, name: str, task: str | None) -> float:
    """Mean squared distance of the denoised sample to the colour of a source."""
    x, _, cond = inputs(batch=8)
    t = torch.full((8,), 0.5)
    xt = 0.5 * LEVELS[name] + 0.5 * x
    return float((xt - 0.5 * bank(xt, t, cond, task=task) - LEVELS[name]).square().mean())


def state(bank, name):
    return {key: one.clone() for key, one in bank.tasks.task_state(name).items()}


def test_joint_source_mixes_tasks_equally():
    source = JointSource([Flat(1.0, count=3), Flat(-1.0, count=8)])
    assert len(source) == 16
    rows = torch.tensor([5, 0, 3, 14, 2])
    batch = source.batch(rows, generators_for(rows.tolist()))
    assert batch.cond.extra["task"].tolist() == [1, 0, 1, 0, 0]
    assert batch.x0[:, 0, 0, 0].tolist() == pytest.approx([-0.98, 1.0, -0.99, 1.01, 1.01])  # places are kept
    assert batch.ids.tolist() == rows.tolist()
    counts = torch.bincount(source.batch(torch.arange(16), generators_for(range(16))).cond.extra["task"])
    assert counts.tolist() == [8, 8]


def test_together(tmp_path):
    (bank, sources), given = ready(), inputs()
    before = bank(*given)
    report = train_together(bank, sources, FlowMatching(), CONFIG, tmp_path)
    assert report.steps == 60
    assert torch.equal(bank(*given), before)
    for name, other in (("low", "high"), ("high", "low")):
        assert error(bank, name, name) < 0.5 * min(error(bank, name, None), error(bank, name, other))


def test_in_turn_forgets_nothing(tmp_path):
    (bank, sources), given = ready(), inputs()
    before = bank(*given)
    train_in_turn(bank, {"low": sources["low"]}, FlowMatching(), CONFIG, tmp_path)
    first, fresh = state(bank, "low"), state(bank, "high")
    train_in_turn(bank, {"high": sources["high"]}, FlowMatching(), CONFIG, tmp_path)
    assert all(torch.equal(first[key], one) for key, one in state(bank, "low").items())
    assert any(not torch.equal(fresh[key], one) for key, one in state(bank, "high").items())
    assert torch.equal(bank(*given), before)
    for name in LEVELS:
        assert error(bank, name, name) < 0.5 * error(bank, name, None)


def test_the_bank_holds_the_average(tmp_path):
    learned = []
    for ema in (0.0, 0.9):  # from the same start, with the same draws
        bank, sources = ready()
        config = replace(CONFIG, steps=5, ema=ema)
        train_together(bank, {"low": sources["low"]}, FlowMatching(), config, tmp_path / str(ema))
        learned.append(state(bank, "low"))
    assert any(not torch.equal(learned[0][key], one) for key, one in learned[1].items())


def test_a_trained_set_and_the_bank_agree(tmp_path):
    (bank, sources), given = ready(), inputs()
    seen = bank.train("low")
    assert torch.equal(seen(*given), bank(*given, task="low"))
    train_together(bank, {"low": sources["low"]}, FlowMatching(), CONFIG, tmp_path)
    assert not torch.equal(seen(*given), bank(*given, task="low"))
    assert torch.equal(bank.train("low")(*given), bank(*given, task="low"))


def test_samples_of_several_shapes_are_refused():
    source = Flat(1.0)
    vars(source)["groups"] = [torch.arange(8)]
    with pytest.raises(UserError, match="several shapes"):
        JointSource([source, Flat(0.0)])
