import json
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest

from smalti import cli
from smalti.core import discovery
from smalti.data import catalog
from smalti.tasks import doctor, text_to_image
from smalti.zoo import loader


def is_one_line(text):
    return text.startswith("smalti: ") and text.count("\n") == 1 and text.endswith("\n")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("generate", "-h"), ("data", "get", "--help")])
def test_help(smalti, arguments):
    result = smalti(*arguments)
    assert result.status == 0
    assert "Usage" in result.out
    assert not result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("genrate",), "Did you mean 'generate'"),
        (("--nope",), "No such option: --nope"),
        (("generate", "--stepz", "3"), "--steps"),
        (("generate", "--steps"), "requires an argument"),
        (("generate", "a", "--steps", "many"), "valid integer"),
        (("generate", "a", "--guidance", "much"), "--guidance"),
        (("doctor", "extra"), "unexpected extra argument"),
        (("data", "nope"), "No such command"),
        (("data", "get"), "Missing argument"),
        (("data", "get", "emojy"), "did you mean 'emoji'"),
        (("bench",), "name the benchmark: accelerators, emoji, guided_start"),
        (("bench", "emojy"), "did you mean 'emoji'"),
        (("bench", "emoji", "--set", "cout=1"), "did you mean 'count'"),
        (("bench", "emoji", "--set", "count=many"), "a value like 400 is needed"),
        (("train",), "either --recipe NAME or --data FOLDER"),
        (("train", "--recipe", "emoji", "--data", "x"), "either --recipe NAME or --data FOLDER"),
        (("train", "--recipe", "emoji", "--size", "64"), "go with --data"),
        (("train", "--recipe", "emojy"), "did you mean 'emoji'"),
        (("train", "--recipe", "folder"), "unknown recipe 'folder'"),
        (("train", "--recipe", "folder_model"), "unknown recipe 'folder_model'"),
        (("train", "--data", "x", "--preset", "cpuu"), "did you mean 'cpu'"),
        (("train", "--data", "x", "--set", "training.stepz=3"), "did you mean 'steps'"),
        (("train", "--data", "x", "--set", "training.steps"), "has no value"),
        (("train", "--data", "x", "--set", "training.steps=0"), "steps is 0"),
        (("train", "--data", "x", "--set", "training=0"), "group of settings"),
        (("train", "--data", "x", "--set", "training.betas=[a, b]"), "cannot be used"),
        (("generate", "a cat", "--model", "nowhere"), "unknown model 'nowhere'"),
        (("generate", "--steps", "0", "a"), "steps is 0"),
        (("generate", "a", "--out", "a.jpg"), "does not end in .png"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(smalti, arguments, message, tmp_path):
    result = smalti(*arguments)
    assert result.status == 2
    assert not result.out
    assert is_one_line(result.err), result.err
    assert message in result.err
    assert not list(tmp_path.iterdir())


def test_generate_prints_files_or_one_document(smalti, tiny_models, tmp_path):
    common = ("--model", tiny_models["text"], "--steps", 2)
    result = smalti("generate", "a cat", "a dog", *common, "--out", "new/a.png", "--style", "all")
    assert (result.status, result.err) == (0, "")
    files = [line.split("  ")[0] for line in result.out.splitlines()]
    assert files == ["new/a-01.png", "new/a-02.png", "new/a-03.png", "new/a-04.png", "new/a.png"]
    assert all(Path(file).is_file() for file in files)
    result = smalti("generate", "a cat", *common, "--out", "b.png", "--seed", 3, "--json")
    assert (result.status, result.err) == (0, "")
    document = json.loads(result.out)
    assert document["pictures"] == [{"file": "b.png", "prompt": "a cat", "style": "flat", "seed": 3}]
    assert document["sheet"] is None
    assert document["seconds"] > 0


def test_a_cut_prompt_is_one_line_on_the_error_stream(smalti, tiny_models):
    long = " ".join(["many words"] * 9)
    common = ("--model", tiny_models["text"], "--steps", 1, "--json")
    result = smalti("generate", long, *common, "--count", 2)
    assert result.status == 0
    assert is_one_line(result.err)
    assert "these words were cut" in result.err
    assert len(json.loads(result.out)["pictures"]) == 2


def test_warnings_of_others_are_not_shown(smalti, tiny_models, monkeypatch):
    draw = text_to_image.draw
    monkeypatch.setattr(text_to_image, "draw", lambda request: warnings.warn("not ours", stacklevel=1) or draw(request))
    result = smalti("generate", "a cat", "--model", tiny_models["text"], "--steps", 1)
    assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "log.jsonl"), OSError(27, "File too large")])
def test_a_full_disk_anywhere_is_one_line(smalti, monkeypatch, error):
    monkeypatch.setattr(text_to_image, "draw", lambda request: (_ for _ in ()).throw(error))
    result = smalti("generate", "a cat")
    assert result.status == 2
    assert is_one_line(result.err)
    assert error.strerror in result.err


def test_our_own_defects_are_not_hidden(monkeypatch):
    monkeypatch.setattr(text_to_image, "draw", lambda request: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["smalti", "generate", "a cat"])
    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError):
        cli.main()


def test_models(smalti, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "ZOO", tmp_path)
    assert "no model ships" in smalti("models").out
    assert json.loads(smalti("models", "--json").out) == {}
    shutil.copytree(tiny_models["text"], tmp_path / "emoji")
    assert smalti("models").out.startswith("emoji  recipe test, ")
    assert json.loads(smalti("models", "--json").out)["emoji"]["recipe"] == "test"


def test_data(smalti, monkeypatch):
    listed = json.loads(smalti("data", "--json").out)
    assert {one["name"]: one["ready"] for one in listed}["emoji"] is True
    assert "emoji" in smalti("data").out
    monkeypatch.setattr(catalog, "get", lambda name, progress: Path(name) / "here")
    assert smalti("data", "get", "emoji").out == "emoji/here\n"
    assert json.loads(smalti("data", "get", "emoji", "--json").out) == {"name": "emoji", "path": "emoji/here"}


BENCHMARK = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Settings:
    '''Things that are counted.'''
    count: int = 3
def run(settings):
    return {"count": settings.count}
def table(result):
    return f"count {result['count']}"
"""


def test_bench(smalti, tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(BENCHMARK)
    monkeypatch.setattr(discovery, "benchmarks", lambda: {"tiny": tmp_path / "tiny.py"})
    assert smalti("bench", "tiny").out == "count 3\n"
    assert json.loads(smalti("bench", "tiny", "--set", "count=5", "--json").out) == {"count": 5}
    assert "Benchmarks: tiny" in smalti("bench", "--help").out
    assert "Things that are counted." in smalti("bench", "tiny", "--help").out
    nameless = smalti("bench")
    assert nameless.status == 2
    assert is_one_line(nameless.err)
    assert "tiny" in nameless.err


@pytest.mark.parametrize("name", discovery.benchmarks())
def test_benchmarks_have_the_shape_that_bench_needs(name):
    module = discovery.load_benchmark(name)
    assert callable(module.run)
    assert callable(module.table)
    module.Settings()


def test_doctor(smalti, monkeypatch):
    checks = [{"name": "python", "ok": True, "found": "3", "required": True}]
    monkeypatch.setattr(doctor, "checkup", lambda: checks)
    assert smalti("doctor").status == 0
    assert json.loads(smalti("doctor", "--json").out) == checks
    checks.append({"name": "npm", "ok": False, "found": "missing", "required": False})
    assert smalti("doctor").status == 0
    checks.append({"name": "torch", "ok": False, "found": "missing", "required": True})
    assert smalti("doctor").status == 1
    assert "NO  torch" in smalti("doctor").out


def test_interrupted(start_cli, tiny_models, tmp_path):
    arguments = ["generate", "a cat", "--model", tiny_models["text"], "--steps", 10**6, "--out", tmp_path / "a.png"]
    process = start_cli(arguments, tmp_path / "log")
    deadline = time.monotonic() + 60
    while not (tmp_path / "log.err").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.join(1.5)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert not (tmp_path / "log.err").read_text().strip()
    assert not (tmp_path / "log.out").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.err", "log.out"]


def test_no_file_may_grow(start_cli, tiny_models, tmp_path):
    arguments = ["generate", "cat", "dog", "--model", tiny_models["text"], "--steps", 1, "--out", tmp_path / "a.png"]
    process = start_cli(arguments, tmp_path / "log", largest_file=1000)
    process.join(60)
    assert process.exitcode == 2
    assert is_one_line((tmp_path / "log.err").read_text())
    assert "File too large" in (tmp_path / "log.err").read_text()
    assert not list(tmp_path.glob("*.png"))
    assert not list(tmp_path.glob(".*"))
