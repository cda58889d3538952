"""`smalti plan` from prompts to plan file, plot and pictures drawn with it."""

import json

import pytest
from PIL import Image

from smalti import cli
from smalti.acceleration.plan import Plan
from smalti.tasks import plan_pipeline


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["smalti", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"a {colour} cat" for colour in ("red", "green", "blue", "white")))
    return file


def test_a_plan_is_searched_written_drawn_and_used(tiny_models, tmp_path, prompts, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    out, plot, model = tmp_path / "plan.json", tmp_path / "plan.png", tiny_models["text"]
    words = ("--speedup", 1.5, "--prompts", prompts, "--steps", 8, "--budget", 0.05, "--out", out, "--plot", plot)
    assert run(monkeypatch, "plan", model, *words) == 0
    printed = capsys.readouterr().out
    found = Plan.load(out)
    assert found.way in printed
    assert "held-out prompts" in printed
    assert not out.with_suffix(".search.json").exists()
    with Image.open(plot) as picture:
        assert picture.size[0] > 400
        assert len(set(picture.convert("L").resize((60, 40)).getdata())) > 3
    if found.methods:
        picture = tmp_path / "cat.png"
        draw = ("generate", "a red cat", "--model", model, "--apply", out, "--steps", found.drawn, "--out", picture)
        assert run(monkeypatch, *draw, "--json") == 0
        assert json.loads(capsys.readouterr().out)["methods"]


def test_held_out_captions_have_all_styles_in_both_halves():
    calls = plan_pipeline.held_out_calls("emoji", 64)
    half = len(calls) // 2
    assert {call["style"] for call in calls[:half]} == {call["style"] for call in calls[half:]}
    assert len({(call["prompt"], call["style"], call["seed"]) for call in calls}) == 64


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--speedup", 2, "--steps", 1), "steps is 1"),
        (("--speedup", 2, "--budget", 0), "budget is 0"),
        (("--speedup", 2), "no prompts were given"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(tiny_models, tmp_path, words, reason, monkeypatch, capsys):
    assert run(monkeypatch, "plan", tiny_models["text"], "--out", tmp_path / "plan.json", *words) != 0
    said = capsys.readouterr().err
    assert reason in said
    assert len(said.strip().splitlines()) == 1
