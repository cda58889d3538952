"""`smalti bench accelerators` on a tiny setting: every method is found, nothing is measured twice."""

import pytest

from smalti.core.discovery import load_benchmark

accelerators = load_benchmark("accelerators")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    keep = str(tmp_path_factory.mktemp("kept") / "kept.json")
    return accelerators.Settings(("emoji",), (6,), (1.5,), offers=1, count=2, sides=(8,), keep=keep)


def test_methods_stand_beside_plain_ways_and_are_measured_once(settings, monkeypatch):
    result = accelerators.run(settings)
    [model] = result["models"]
    names = {row["method"] for row in model["rows"]}
    assert {"plain", "TaylorSeer"} <= names
    assert 0 < model["attention"] < 1
    for row in model["rows"]:
        assert row["distance"] > 0
        assert row["kept"] >= 0
        assert row["flops"] > 0.5
    assert any("taylorseer" in one["method"] for one in result["tokens"])
    text = accelerators.table(result)
    assert "on a random model" in text
    monkeypatch.setattr(accelerators, "_figures", None)
    monkeypatch.setattr(accelerators, "_ratio", None)
    again = accelerators.run(settings)
    assert again["models"] == result["models"]
    assert again["tokens"] == result["tokens"]


def test_without_time_nothing_is_begun(settings, tmp_path):
    late = accelerators.Settings(("emoji",), (6,), (1.5,), 1, 2, (8,), minutes=-1.0, keep=str(tmp_path / "other.json"))
    result = accelerators.run(late)
    assert not result["is_whole"]
    assert not result["models"][0]["rows"]


@pytest.mark.parametrize(
    ("lows", "said"),
    [
        ((0.5, 1.1, 1.2), "faster from 1024"),
        ((1.1, 1.1, 1.1), "faster from 256"),
        ((1.2, 0.9, 0.8), "not faster up to"),
    ],
)
def test_faster_means_at_all_larger_numbers(lows, said):
    ratios = {str(count): [low + 0.1, low, low + 0.2] for count, low in zip((256, 1024, 2304), lows, strict=True)}
    assert said in accelerators.faster_from(ratios)
