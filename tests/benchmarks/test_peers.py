"""The comparison with peers: what it measures, what it judges, and what it says where a peer does not run."""

import json
import sys

import pytest
from peer_shapes import TINY

from smalti.core.discovery import load_benchmark
from smalti.core.errors import UserError

peers = load_benchmark("peers")
SHORT = {"steps": 9, "warmup": 2, "interval": 3, "repeats": 1, "prompts": 2}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(peers, "SMALL", TINY)


def rows_of(result, model):
    return {row["name"]: row for row in result["models"][model]["rows"]}


def test_measures_and_judges(small):
    pytest.importorskip("cache_dit")
    result = peers.run(peers.Settings(models=("flux", "wan"), **SHORT))
    assert json.loads(json.dumps(result))["settings"]["steps"] == 9
    for model in result["models"]:
        rows = rows_of(result, model)
        plain = rows["plain"]
        assert (plain["full"], plain["partial"], plain["held_bytes"]) == (9, 0, 0)
        for one in peers.CONTESTANTS:
            row = rows[one.name]
            assert row["reason"] is None
            assert (row["full"], row["partial"]) == (4, 5)
            assert row["flops"] < 0.75 * plain["flops"]
            assert row["held_bytes"] > 0
            assert row["ratio"]["pairs"] == 1
            assert row["distance"] is None
        fewer = [row for row in rows.values() if row["form"] == "steps"]
        assert fewer[0]["flops"] == pytest.approx(plain["flops"] * fewer[0]["full"] / 9)
        assert all(any(row["flops"] <= one["flops"] for one in fewer) for row in rows.values() if row["owner"])
    assert len(result["acceptance"]) == 6
    assert all(one["accepted"] for one in result["acceptance"])
    text = peers.table(result)
    assert "random weights" in text
    assert "flux, ours, lite: accepted" in text


def test_distance_on_the_trained_model(monkeypatch):
    names = ("ours, order 1", "diffusers, our steps")
    monkeypatch.setattr(peers, "CONTESTANTS", [one for one in peers.CONTESTANTS if one.name in names])
    result = peers.run(peers.Settings(models=("emoji",), **SHORT))
    ours, theirs = (rows_of(result, "emoji")[name]["distance"] for name in names)
    assert ours == pytest.approx(theirs, rel=1e-3)  # the same forecast at the same places
    assert ours > 1e-3
    assert result["acceptance"] == []
    assert f"{ours:.4f}" in peers.table(result)


def test_a_peer_that_is_missing_or_fails_says_so(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)

    def broken(model, schedule):
        raise AttributeError("no place\nfor me")

    contestants = [one for one in peers.CONTESTANTS if one.name in ("ours, order 1", "cache-dit, order 1")]
    contestants.append(peers.Contestant("broken", "diffusers", "full", 1, broken))
    monkeypatch.setattr(peers, "CONTESTANTS", contestants)
    result = peers.run(peers.Settings(models=("wan",), **SHORT))
    rows = rows_of(result, "wan")
    assert rows["cache-dit, order 1"]["reason"] == "not installed (pip install 'smalti[peers]')"
    assert rows["broken"]["reason"] == "cannot attach: AttributeError: no place for me"
    (verdict,) = result["acceptance"]
    assert not verdict["accepted"]
    assert "no peer" in verdict["why"]
    assert "not installed" in peers.table(result)
    monkeypatch.setattr(peers, "CONTESTANTS", [peers.Contestant("broken", "smalti", "full", 1, broken)])
    with pytest.raises(AttributeError):  # ours never fails in silence
        peers.run(peers.Settings(models=("wan",), **SHORT))


def test_judge():
    def row(owner, form, flops, held, order=1, full=3):
        return {"name": owner, "owner": owner, "form": form, "order": order, "flops": flops, "held_bytes": held,
                "full": full, "reason": None}  # fmt: skip

    def accepted(*rows):
        return [one["accepted"] for one in peers.judge("flux", list(rows))]

    ours = row("smalti", "full", 10.0, 100)
    assert accepted(ours, row("diffusers", "full", 10.0, 100)) == [True]
    assert accepted(ours, row("diffusers", "full", 10.0, 99)) == [False]
    assert accepted(ours, row("diffusers", "full", 9.0, 200)) == [False]
    assert accepted(ours, row("cache-dit", "blocks", 11.0, 1)) == [True]  # of another form: memory does not compare
    assert accepted(ours, row("cache-dit", "blocks", 9.0, 1)) == [False]
    assert accepted(ours, row("diffusers", "full", 10.0, 100, full=4)) == [False]  # another schedule
    assert accepted(ours, row("diffusers", "full", 10.0, 100, order=2)) == [False]
    assert accepted(ours, row("diffusers", "lite", 10.0, 100)) == [False]


def test_bad_input_is_named():
    for settings, words in (
        ({"models": ("fluks",)}, "did you mean 'flux'"),
        ({"device": "gpu"}, "unknown device"),
        ({"steps": 3}, "is a forecast"),
    ):
        with pytest.raises(UserError, match=words):
            peers.run(peers.Settings(**settings))
