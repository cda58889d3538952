"""`smalti plan` from prompts to plan file, plot and pictures drawn with it."""

import json

import pytest
from PIL import Image

from smalti.acceleration.plan import Plan
from smalti.tasks import plan_pipeline


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"a {colour} cat" for colour in ("red", "green", "blue", "white")))
    return file


def test_a_plan_is_searched_written_drawn_and_used(tiny_models, tmp_path, prompts, smalti):
    pytest.importorskip("matplotlib")
    out, plot, model = tmp_path / "plan.json", tmp_path / "plan.png", tiny_models["text"]
    words = ("--speedup", 1.5, "--prompts", prompts, "--steps", 8, "--budget", 0.05, "--out", out, "--plot", plot)
    done = smalti("plan", model, *words)
    assert done.status == 0
    found = Plan.load(out)
    assert found.way in done.out
    assert "held-out prompts" in done.out
    assert not out.with_suffix(".search.json").exists()
    with Image.open(plot) as picture:
        assert picture.size[0] > 400
        assert len(set(picture.convert("L").resize((60, 40)).getdata())) > 3
    if found.methods:
        picture = tmp_path / "cat.png"
        draw = ("generate", "a red cat", "--model", model, "--apply", out, "--steps", found.drawn, "--out", picture)
        assert json.loads(smalti(*draw, "--json").out)["methods"]


def test_a_pipeline_of_diffusers_from_a_folder(pixart, tmp_path, smalti):
    out, prompts = tmp_path / "plan.json", tmp_path / "prompts.jsonl"
    calls = [
        {"prompt": f"a {thing}", "use_resolution_binning": False} for thing in ("cat", "apple", "heart", "red cat")
    ]
    prompts.write_text("\n".join(map(json.dumps, calls)))
    words = ("--prompts", prompts, "--steps", 12, "--size", 32, "--budget", 0.2, "--speedup", 1.2, "--out", out)
    done = smalti("plan", pixart, *words)
    assert done.status == 0, done.err
    found = Plan.load(out)
    assert found.model == "PixArtTransformer2DModel"
    assert found.sample == (4, 16, 16)
    assert any("fewer" in one["way"] or one["way"].endswith("steps") for one in found.alternatives)
    assert not any("dpm++" in one["way"] for one in found.alternatives)  # its solver is the user's


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
def test_what_cannot_be_planned_is_said_in_one_line(tiny_models, tmp_path, words, reason, smalti):
    done = smalti("plan", tiny_models["text"], "--out", tmp_path / "plan.json", *words)
    assert done.status == 2
    assert reason in done.err
    assert len(done.err.strip().splitlines()) == 1
