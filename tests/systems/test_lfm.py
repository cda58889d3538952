"""What the page makes of the figures of its arms."""

from types import SimpleNamespace

import pytest

from smalti.evaluation.arms import Arms
from smalti.systems import lfm


class Figures(dict):
    """Everything that is asked for is 1, unless it was given."""

    def __missing__(self, name):
        return 1.0


def verdict(monkeypatch, **first):
    flow = [Figures({f"FD at {calls}": 50.0 + seed for calls in lfm.CALLS}) for seed in range(3)]
    ddpm = [Figures({f"FD at {calls}": 100.0 + seed for calls in lfm.CALLS}) for seed in range(3)]
    flow[0].update(first)
    monkeypatch.setattr(lfm, "stock", lambda: None)
    monkeypatch.setattr(lfm, "run_arms", lambda *_, **__: Arms({"flow": flow, "ddpm": ddpm}, (0, 1, 2)))
    context = SimpleNamespace(seeds=(0, 1, 2), budget=1.0, scratch=None, say=print)
    return lfm.small(context)


def test_the_rule_and_its_checks(monkeypatch):
    good = {
        "RMSE, dopri5 1e-5": 0.005, "calls, dopri5 1e-3": 40.0, "calls, dopri5 1e-5": 90.0, "FD, dopri5 1e-3": 1.02,
        "accuracy, guidance 2": 1.1, "accuracy, guidance 4": 1.2, "spread of a class, guidance 2": 0.9,
        "spread of a class, guidance 4": 0.8, "inside": 0.5, "perceptual": 0.5, "outside": 0.0, "mIoU": 0.7,
        "mIoU, shuffled": 0.1,
    }  # fmt: skip
    found = verdict(monkeypatch, **good)
    assert found.outcome == "holds"
    assert found.ours == 51
    assert found.comparators == {"ddpm": 101}
    assert all(check.holds is not False for check in found.checks)
    assert sum(check.holds is True for check in found.checks) == 10
    worse = {**good, "FD at 20": 120.0, "outside": 0.1, "mIoU, shuffled": 0.5, "accuracy, guidance 4": 1.0}
    failing = [check.name for check in verdict(monkeypatch, **worse).checks if check.holds is False]
    assert len(failing) == 3  # the mean over seeds is still below


def test_too_small_a_margin_is_no_claim(monkeypatch):
    monkeypatch.setattr(lfm, "FEW", 5)
    found = verdict(monkeypatch, **{"FD at 5": 300.0})
    assert found.outcome != "holds"
    assert found.as_json()["rule"] == "ours < 0.8 * ddpm"


@pytest.mark.parametrize("name", lfm.ARMS)
def test_arms_are_tuned_alike_and_differ_in_the_objective_alone(name):
    assert lfm.RATES[name] > 0
    assert lfm.settings(100, lfm.RATES[name], 3).batch == 64
