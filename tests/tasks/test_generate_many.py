"""A file of prompts becomes a folder of pictures: each once, the same wherever it was drawn, nothing overwritten."""

import json
import os
import threading
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from smalti.core.errors import UserError
from smalti.tasks.generate_many import Request, draw_all

PROMPTS = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("cat", "dog", "tree")]


@pytest.fixture
def asked(tiny_models, tmp_path):
    def make(out="pictures", lines=PROMPTS, **settings):
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(lines))
        return Request(file, tmp_path / out, str(tiny_models["text"]), **{"steps": 2, **settings})

    return make


def contents(folder):
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted(folder.glob("*.png"))}


def are_equal(one, other):
    """Up to rounding, which depends on how many pictures are drawn at a time."""
    return one.keys() == other.keys() and all(np.abs(one[name] - other[name]).max() <= 1 for name in one)


def test_every_line_is_a_picture_and_a_second_run_draws_only_what_is_missing(asked, tmp_path):
    request = asked(seed=7)
    done = draw_all(request)
    assert (done["pictures"], done["drawn"]) == (9, 9)
    rows = [json.loads(line) for line in (request.out / "pictures.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["seed"] for row in rows] == list(range(7, 16))
    with Image.open(request.out / "000003.png") as picture:
        settings = json.loads(picture.text["smalti"])
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a green cat", 10, 2)
    before = contents(request.out)
    (request.out / "000003.png").unlink()
    assert draw_all(request)["drawn"] == 1
    assert are_equal(contents(request.out), before)


def test_nothing_is_overwritten(asked):
    request = asked(lines=PROMPTS[:2])
    draw_all(request)
    with pytest.raises(UserError, match="'a red cat' with other settings; choose another --out"):
        draw_all(asked(lines=PROMPTS[:2], steps=3))
    (request.out / "000000.png").write_text("a letter")
    with pytest.raises(UserError, match="no picture of ours"):
        draw_all(request)
    assert (request.out / "000000.png").read_text() == "a letter"
    (request.out / "pictures.jsonl").write_text("of other things")
    with pytest.raises(UserError, match="list of other pictures"):
        draw_all(request)
    assert (request.out / "pictures.jsonl").read_text() == "of other things"


def test_lines_may_be_added(asked):
    draw_all(asked(lines=PROMPTS[:2]))
    done = draw_all(asked(lines=PROMPTS[:4]))
    assert (done["pictures"], done["drawn"]) == (4, 2)


def test_lines_may_have_arguments_of_their_own(asked, tmp_path):
    (tmp_path / "lines.jsonl").write_text(
        '{"prompt": "a cat", "seed": 3, "style": "round"}\n{"prompt": "a dog", "height": 64, "width": 128}\n'
    )
    model = asked().model
    draw_all(Request(tmp_path / "lines.jsonl", tmp_path / "own", model, steps=2))
    rows = [json.loads(line) for line in (tmp_path / "own" / "pictures.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["style"]) for row in rows] == [(3, "round"), (1, "flat")]
    with Image.open(tmp_path / "own" / "000001.png") as picture:
        assert picture.size == (128, 64)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"out": "a.png"}, "looks like a file"),
        ({"style": "cubist"}, "cubist"),
        ({"cluster": "slurm"}, "ray"),
        ({"cluster": "ray", "workers": 0}, "workers is 0"),
        ({"cluster": "ray", "solver": "eular"}, "euler"),
        ({"cluster": "ray", "methods": ("grit",)}, "grat"),
        ({"methods": ("grit",)}, "grat"),
    ],
)
def test_mistakes_are_said(asked, settings, reason):
    with pytest.raises(UserError, match=reason):
        draw_all(asked(**settings))


def test_the_command_line(asked, smalti):
    request = asked(lines=PROMPTS[:2])
    words = ("--model", request.model, "--steps", 2)
    done = smalti("generate", "--prompts", request.prompts, *words, "--out", request.out)
    assert done.status == 0, done.err
    assert "2 pictures, 2 of them drawn now" in done.out
    assert smalti("generate", "a cat", "--prompts", request.prompts, *words).status == 2
    assert "give --prompts FILE" in smalti("generate", "a cat", *words, "--cluster", "ray").err


@pytest.mark.slow
def test_workers_of_ray_draw_the_same_though_one_is_killed(asked, tmp_path):
    pytest.importorskip("ray")
    here = asked("here", steps=30)
    draw_all(here)
    there = asked("there", steps=30, cluster="ray", workers=2)
    killed = []

    def kill_one():
        while not any(there.out.glob("*.png")):
            time.sleep(0.01)
        for process in psutil.Process(os.getpid()).children(recursive=True):
            if not killed and process.name().startswith("ray::_Worker"):
                process.kill()
                killed.append(process.pid)

    thread = threading.Thread(target=kill_one)
    thread.start()
    done = draw_all(there)
    thread.join()
    assert killed
    assert done["drawn"] == 9
    assert are_equal(contents(there.out), contents(here.out))
    assert sorted(file.name for file in there.out.iterdir()) == sorted([*contents(here.out), "pictures.jsonl"])
