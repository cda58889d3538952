"""The planner: what it tries, what it prefers, what it says when a target cannot be met."""

import json
import math
import time
from dataclasses import replace

import pytest

from smalti.acceleration.planner import Search, front_of, neighbours, plan
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.errors import UserError
from smalti.evaluation.ways import Bench, Trial, Way, psnr
from smalti.zoo.loader import load_model

PROMPTS = [{"prompt": f"{thing} on a boat", "style": "round"} for thing in ("dog", "cat", "sun", "car", "tree", "egg")]


@pytest.fixture(scope="module")
def pipe(tiny_models):
    return load_model(tiny_models["text"])


def test_the_plan_is_measured_on_prompts_that_the_search_never_saw(pipe, tmp_path, monkeypatch):
    seen = []
    measure = Bench._measure

    def watched(self, way, count):
        seen.append((way, [call["prompt"] for call in self.calls]))
        return measure(self, way, count)

    monkeypatch.setattr(Bench, "_measure", watched)
    keep = tmp_path / "keep.json"
    found = plan(pipe, PROMPTS, speedup=1.5, steps=12, minutes=0.2, keep=keep)
    assert found.model == "MMDiT"
    assert found.sample == (16, 8, 8)
    assert {"speedup", "distance", "psnr"} == set(found.measured)
    names = [one["way"] for one in found.alternatives]
    assert any(name.endswith(" steps") for name in names)
    assert any(name.endswith("dpm++") for name in names)
    assert any("guided" in name for name in names)
    searched = {prompt for way, prompts in seen[:5] for prompt in prompts}
    judged = set(seen[-1][1])
    assert len(searched) == len(judged) == 3
    assert not searched & judged
    assert {type(method) for way, _ in seen for method in way.methods} >= {TaylorSeer}
    known = json.loads(keep.read_text())["known"]
    assert len(known) >= 5
    seen.clear()
    plan(pipe, PROMPTS, speedup=1.5, steps=12, minutes=0.01, keep=keep)
    assert not [way for way, prompts in seen if set(prompts) == searched and f"{way.name} | 3" in known]


@pytest.mark.slow
def test_workers_of_ray_try_what_one_process_would(pipe):
    pytest.importorskip("ray")
    alone, shared = (Search(Bench(pipe, [{**one, "seed": 0} for one in PROMPTS], Way(steps=8)), time.monotonic() + 60,
                            None, False, cluster) for cluster in ("", "ray"))  # fmt: skip
    ways = list(alone.ways(2.0))[:6]
    here, there = alone.look_all(ways), shared.look_all(ways)
    assert [one.way for one in here] == [one.way for one in there]
    assert [one.distance for one in here] == pytest.approx([one.distance for one in there], rel=1e-3)
    assert not shared.bench.results, "the ways were measured here"


def test_a_target_out_of_reach_is_said(pipe):
    found = plan(pipe, PROMPTS, speedup=500.0, steps=4, minutes=0.05)
    assert not found.is_met
    assert any("few" in note for note in found.notes)


def test_a_distance_is_a_target_too(pipe):
    found = plan(pipe, PROMPTS, psnr=5.0, steps=12, minutes=0.1)
    assert found.is_met == (found.measured["psnr"] >= 5.0)
    assert found.target == {"psnr": 5.0}


def test_the_front_holds_what_nothing_beats():
    def trial(speedup, distance):
        return Trial(Way(), speedup, distance)

    trials = {str(one): one for one in (trial(1, 0.1), trial(2, 0.2), trial(2, 0.15), trial(3, 0.5), trial(1.5, 0.3))}
    assert [(one.speedup, one.distance) for one in front_of(trials)] == [(1, 0.1), (2, 0.15), (3, 0.5)]


def test_neighbours_differ_in_one_number():
    start = Way((TaylorSeer(full_at=(0, 2, 5, 9)),), 12)
    moved = [way.methods[0] for way in neighbours(start)]
    assert {one.full_at for one in moved} >= {
        (0, 1, 5, 9),
        (0, 3, 5, 9),
        (0, 2, 4, 9),
        (0, 2, 5, 10),
        (0, 2, 5, 7, 9),
        (0, 2, 5),
    }
    assert {one.order for one in moved} == {0, 1, 2}
    assert all(sum(value != vars(start.methods[0])[name] for name, value in vars(one).items()) == 1 for one in moved)
    last = Way((TaylorSeer(full_at=(0, 2, 5, 11)),), 12)
    assert all(one.methods[0].full_at[-1] < 12 for one in neighbours(last))  # of 12 steps the last has index 11


def test_a_change_that_draws_the_same_is_no_better_however_fast_it_looked(pipe, monkeypatch):
    pipe.set_progress_bar_config(disable=True)
    start = Trial(Way((TaylorSeer(full_at=(0, 2, 5, 9)),), 12), 1.9, 0.1)
    search = Search(Bench(pipe, [{**call, "seed": 0} for call in PROMPTS], Way(steps=12)), math.inf, None, False)
    monkeypatch.setattr(search, "look", lambda way, count: Trial(way, 2.5, 0.1))
    assert search.climb(start, 2.0) is start
    nearer = Way((TaylorSeer(full_at=(0, 1, 5, 9)),), 12)
    monkeypatch.setattr(search, "look", lambda way, count: Trial(way, 2.5, 0.05 if way == nearer else 0.1))
    assert search.climb(start, 2.0).way == nearer


def test_a_nearer_way_that_was_timed_a_little_too_slow_is_timed_again(pipe, monkeypatch):
    pipe.set_progress_bar_config(disable=True)
    bench = Bench(pipe, [{**call, "seed": 0} for call in PROMPTS], Way(steps=12))
    start = Trial(Way((TaylorSeer(full_at=(0, 2, 5, 9)),), 12), 2.1, 0.1)
    nearer = Way((TaylorSeer(full_at=(0, 1, 5, 9)),), 12)
    for true, found in ((2.05, nearer), (1.97, start.way)):
        search = Search(bench, math.inf, None, False)
        monkeypatch.setattr(search, "look", lambda way, count: Trial(way, 1.96, 0.05 if way == nearer else 0.1))
        monkeypatch.setattr(search, "timed_again", lambda one, count, true=true: replace(one, speedup=true))
        assert search.climb(start, 2.0).way == found


def test_timing_again_is_remembered(pipe):
    pipe.set_progress_bar_config(disable=True)
    bench, way = Bench(pipe, [{**call, "seed": 0} for call in PROMPTS], Way(steps=4)), Way(steps=2)
    first = bench.measure(way, 2)
    again = Search(bench, math.inf, None, False).timed_again(replace(first, speedup=9.0), 2)
    assert 1 < again.speedup < 4
    assert (again.distance, bench.measure(way, 2)) == (first.distance, again)
    late = Search(bench, -math.inf, None, False).timed_again(replace(first, speedup=9.0), 2)
    assert late.speedup == 9.0


def test_for_a_distance_the_fastest_way_that_is_near_enough_is_taken(pipe, monkeypatch):
    pipe.set_progress_bar_config(disable=True)
    search = Search(Bench(pipe, [{**call, "seed": 0} for call in PROMPTS], Way(steps=12)), math.inf, None, False)

    def look(way, count):
        full = getattr(way.methods[0], "full_at", ()) if way.methods else ()
        speed = 12 / len(full or range(way.steps))
        found = Trial(way, speed, speed / 10, 50 - 8 * speed)  # 30 dB at a speed of 2.5
        search.trials[f"{way.name} | {count}"] = found
        return found

    monkeypatch.setattr(search, "look", look)
    monkeypatch.setattr(search, "timed_again", lambda trial, count: trial)
    found = search.fastest(30.0)
    assert 30 <= found.psnr < 35
    assert search.fastest(49.0).speedup == 1.0  # nothing is near enough: the nearest


def test_the_plain_way_is_at_no_distance_and_memory_can_be_bounded(pipe):
    pipe.set_progress_bar_config(disable=True)
    calls = [{**call, "seed": seed} for seed, call in enumerate(PROMPTS)]
    bench = Bench(pipe, calls, Way(steps=6), with_pictures=True)
    plain = bench.measure(Way(steps=6), 2)
    assert (plain.distance, plain.psnr) == (0.0, 100.0)
    taylor = Way((TaylorSeer(full_at=(0, 1, 3)),), 6)
    assert bench.measure(taylor, 2).distance > 0
    assert Bench(pipe, calls, Way(steps=6), kept_limit=10).measure(taylor, 2) is None
    stacked = Bench(pipe, calls, Way(steps=6), batch=2)
    assert stacked.measure(taylor, 4).distance == pytest.approx(bench.measure(taylor, 4).distance, rel=1e-3)


@pytest.mark.parametrize(
    ("prompts", "target", "reason"),
    [
        (PROMPTS, {}, "one target"),
        (PROMPTS, {"speedup": 2.0, "psnr": 30.0}, "one target"),
        (PROMPTS, {"speedup": 1.0}, "above 1"),
        (PROMPTS[:3], {"speedup": 2.0}, "at least 4"),
    ],
)
def test_what_cannot_be_planned_is_refused(pipe, prompts, target, reason):
    with pytest.raises(UserError, match=reason):
        plan(pipe, prompts, **target)


def test_ways_have_names_that_tell_them_apart():
    ways = [Way(), Way(steps=9), Way(solver="dpm++"), Way(interval=(0.0, 0.5)), Way((TaylorSeer(),))]
    assert len({way.name for way in ways}) == len(ways)
    assert psnr([0.5], [0.4]) == pytest.approx(20)
    assert math.isnan(Trial(Way(), 1.0, 0.1).psnr)
