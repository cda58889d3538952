"""The speed benchmark runs, refuses unequal models and bad input, and writes what it measured."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "mmdit_speed.py"
SPEC = importlib.util.spec_from_file_location("mmdit_speed", FILE)
mmdit_speed = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mmdit_speed)


def test_reports_what_it_measured(tmp_path):
    file = tmp_path / "speed.json"
    status = mmdit_speed.main(["--shape", "tiny", "--repeats", "3", "--warmup", "1", "--json", str(file)])
    report = json.loads(file.read_text())
    both = [report["training"], report["sampling"]]
    assert status == (0 if all(part["reaches_one"] for part in both) else 1)
    for part in both:
        assert part["pairs"] == 3
        assert 0 < part["low"] <= part["median"] <= part["high"]
    assert report["equality"]["output_difference"] <= 1e-5
    assert report["machine"]["threads"] == 1


def test_unequal_models_are_not_timed():
    pair = mmdit_speed.Pair(mmdit_speed.SHAPES["tiny"], torch.device("cpu"), torch.float32)
    pair.check()
    torch.nn.init.normal_(pair.ours.single_blocks[0].attn.norm_k.weight)
    with pytest.raises(RuntimeError, match="differ"):
        pair.check()


def test_bad_input_ends_with_status_2(capsys):
    assert mmdit_speed.main(["--shape", "tinny"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
