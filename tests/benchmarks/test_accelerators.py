"""`smalti bench accelerators` on a tiny setting: every method is found, nothing is measured twice."""

from dataclasses import replace

import pytest
import torch

from smalti.core.discovery import load_benchmark
from smalti.evaluation import full_size_video

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


def test_published_shapes_are_timed(settings, monkeypatch):
    config = {"num_layers": 2, "num_attention_heads": 1, "ffn_dim": 32, "attention_head_dim": 16}
    shape = full_size_video.SHAPES["wan-1.3b"]
    small = replace(shape, config={**shape.config, **config}, text=(3, 4096))
    monkeypatch.setitem(full_size_video.SHAPES, "wan-1.3b", small)
    monkeypatch.setattr(accelerators, "FULL", (("wan-1.3b", (5, 32, 48)),))
    monkeypatch.setattr(accelerators, "FULL_STEPS", 8)
    found = accelerators._full(accelerators.Kept(settings), torch.device("cpu"))
    assert any(one["method"].startswith("taylorseer") for one in found)
    assert all(one["model"] == "wan-1.3b" and len(one["ratio"]) == 4 for one in found)
    text = accelerators.table({"models": [], "tokens": [], "full": found})
    assert "wan-1.3b [5, 32, 48]" in text


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
