"""What methods offer to a planner: settings that exist, differ, act, and are as fast as asked where they say so."""

import pytest

from smalti.acceleration.ras import RAS
from smalti.core.method import CoreMethod
from smalti.evaluation.ways import Bench, Way
from smalti.seams.find import methods
from smalti.zoo.loader import load_model

OFFERING = [kind for kind in methods() if kind.candidates(28, 2.0)]


def test_caches_token_skipping_and_sparse_attention_are_offered():
    assert {"TaylorSeer", "ConfidenceGatedTaylor", "RAS", "GRAT", "DraftAttention", "ReTtention"} <= {
        kind.__name__ for kind in OFFERING
    }


@pytest.mark.parametrize("kind", OFFERING, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("steps", "speedup"), [(28, 3.0), (50, 2.0), (12, 1.3), (4, 2.0)])
def test_candidates_differ_and_ask_for_something(kind, steps, speedup):
    found = kind.candidates(steps, speedup)
    assert len(set(found)) == len(found) <= 40
    assert all(isinstance(one, kind) and not one.is_neutral for one in found)


@pytest.mark.parametrize("kind", OFFERING, ids=lambda kind: kind.__name__)
def test_some_of_them_act_on_a_small_model(kind, tiny_models):
    pipe = load_model(tiny_models["text"])
    pipe.set_progress_bar_config(disable=True)
    calls = [{"prompt": "a cat", "style": "round", "seed": seed} for seed in range(2)]
    bench = Bench(pipe, calls, Way(steps=12), batch=2)
    ways = [Way((method,), 12) for method in kind.candidates(12, 1.5)]
    found = [trial for trial in (bench.measure(way, 2) for way in ways) if trial]
    assert any(trial.distance > 0 for trial in found)


@pytest.mark.parametrize(("steps", "speedup"), [(28, 3.0), (28, 1.5), (50, 2.0)])
def test_ras_computes_as_many_tokens_as_the_speed_allows(steps, speedup):
    for one in RAS.candidates(steps, speedup):
        dense = one.start + len(one.resets)
        assert (dense + (steps - dense) * one.ratio) / steps == pytest.approx(1 / speedup, abs=0.01)
        assert all(one.start < reset < steps for reset in one.resets)


def test_sparse_attention_makes_no_promise_of_speed():
    """How much it saves depends on the share of attention, which a planner measures: the offers are the same."""
    for kind in OFFERING:
        if issubclass(kind, CoreMethod):
            assert len(kind.candidates(28, 1.2)) == len(kind.candidates(28, 3.0))
