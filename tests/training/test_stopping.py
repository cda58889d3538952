"""Rules that end losses: when, together, once, and never again after a resume."""

import json

import pytest
import torch
from toy_training import DIM, PlanesSource

from smalti.backbones.dit import DiT
from smalti.core.errors import UserError
from smalti.objectives.flow_matching import FlowMatching
from smalti.training.config import TrainConfig
from smalti.training.progress import read_log
from smalti.training.repa import REPA, REPASettings, TeacherPort
from smalti.training.stopping import StopAt, StopOnConflict, StopOnPlateau
from smalti.training.trainer import Trainer


def trainer(out, stops, **settings):
    torch.manual_seed(3)
    term = REPA(16, [TeacherPort("teacher", DIM)], REPASettings(depth=1, hidden=16))
    torch.manual_seed(0)
    config = TrainConfig(**{"steps": 12, "batch": 16, "learning_rate": 3e-3, "log_every": 1, "ema": 0.9, **settings})
    return Trainer(DiT.tiny(), FlowMatching(), PlanesSource(), config, out, losses=[term], stops=stops)


def ends(rule, figures):
    """After how many looks a rule ends, through json each time as a checkpoint would keep it."""
    memory = {}
    for number, figure in enumerate(figures, 1):
        if rule.judge(memory, number, figure):
            return number
        memory = json.loads(json.dumps(memory))
    return None


def test_conflict_needs_a_running_mean_below_the_threshold_so_many_times_in_a_row():
    rule = StopOnConflict(("a",), threshold=0.0, checks=3, keep=0.0)
    assert ends(rule, [0.5, -0.1, -0.1, 0.1, -0.1, -0.1, -0.1]) == 7
    assert ends(rule, [0.5] * 20) is None
    slow = StopOnConflict(("a",), threshold=0.0, checks=1, keep=0.9)
    assert ends(slow, [1.0, -0.5, -0.5]) is None  # one bad step is not enough
    assert ends(slow, [1.0] + [-0.5] * 30) == 12
    assert ends(StopOnConflict(("a",), threshold=-1.0), [-1.0] * 50) is None


def test_a_plateau_is_no_fall_below_the_best_so_many_times_in_a_row():
    rule = StopOnPlateau(("a",), least=0.1, checks=2, keep=0.0)
    assert ends(rule, [1.0, 0.8, 0.75, 0.6, 0.55, 0.55]) == 6
    assert ends(rule, [1.0 - 0.2 * k for k in range(20)]) is None


def test_a_step_is_the_number_of_finished_steps_with_the_loss(tmp_path):
    for step in (0, 5, 40):
        report = trainer(tmp_path / str(step), [StopAt(("repa",), step)]).fit()
        has_term = ["repa" in line for line in read_log(report.curve)]
        assert has_term == [True] * min(step, 12) + [False] * max(0, 12 - step)


def test_a_plateau_ends_a_loss_of_a_training(tmp_path):
    done = trainer(tmp_path, [StopOnPlateau(("repa",), least=10.0, checks=2, every=3)])
    report = done.fit()
    assert sum("repa" in line for line in read_log(report.curve)) == 9  # best at 3, stale at 6 and 9
    assert done.stopping.memory[0]["stopped"] == 9


@pytest.mark.parametrize("cut", [4, 7])
def test_what_a_rule_remembers_is_resumed(tmp_path, cut):
    rules = [StopOnConflict(("repa",), threshold=1.1, checks=3, every=2)]
    whole = trainer(tmp_path / "whole", rules)
    whole.fit()
    trainer(tmp_path / "parts", rules, steps=cut).fit()
    parts = trainer(tmp_path / "parts", rules)
    report = parts.fit(resume=True)
    assert parts.stopping.memory == whole.stopping.memory
    assert sum("repa" in line for line in read_log(report.curve)) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.ema_model.parameters(), parts.ema_model.parameters()))


def test_measuring_the_angle_changes_nothing(tmp_path):
    plain, measured = trainer(tmp_path / "a", []), trainer(tmp_path / "b", [StopOnConflict(("repa",), -1.0, every=2)])
    plain.fit()
    measured.fit()
    assert all(torch.equal(a, b) for a, b in zip(plain.ema_model.parameters(), measured.ema_model.parameters()))


@pytest.mark.slow
def test_a_compiled_model_is_compiled_again_without_taps(tmp_path):
    done = trainer(tmp_path / "compiled", [StopAt(("repa",), 2)], steps=5, compile=True)
    renew, counters = done.stopping.renew, torch._dynamo.utils.counters

    def count_from_here():
        renew()
        counters.clear()

    done.stopping.renew = count_from_here
    done.fit()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    eager = trainer(tmp_path / "eager", [StopAt(("repa",), 2)], steps=5)
    eager.fit()
    pairs = zip(done.ema_model.parameters(), eager.ema_model.parameters())
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="did you mean 'repa'"):
        trainer(tmp_path, [StopAt(("repo",), 3)])
    with pytest.raises(UserError, match="whole parameters"):
        trainer(tmp_path, [StopOnConflict(("repa",))], compile=True)
    with pytest.raises(UserError, match="at least 1"):
        StopOnPlateau(("repa",), checks=0)
    with pytest.raises(UserError, match="at least 0"):
        StopAt(("repa",), -1)
