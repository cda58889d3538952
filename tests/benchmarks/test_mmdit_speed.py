"""The speed benchmark runs, refuses unequal models and bad input, and writes what it measured."""

import pytest
import torch

from smalti.core.discovery import load_benchmark
from smalti.core.errors import UserError

mmdit_speed = load_benchmark("mmdit_speed")


def test_reports_what_it_measured():
    report = mmdit_speed.run(mmdit_speed.Settings(shape="tiny", repeats=3, warmup=1))
    for part in (report["training"], report["sampling"]):
        assert part["pairs"] == 3
        assert 0 < part["low"] <= part["median"] <= part["high"]
    assert report["equality"]["output_difference"] <= 1e-5
    assert report["settings"]["threads"] == 1
    assert "training" in mmdit_speed.table(report)


def test_unequal_models_are_not_timed():
    pair = mmdit_speed.Pair(mmdit_speed.SHAPES["tiny"], torch.device("cpu"), torch.float32)
    pair.check()
    torch.nn.init.normal_(pair.ours.single_blocks[0].attn.norm_k.weight)
    with pytest.raises(RuntimeError, match="differ"):
        pair.check()


def test_bad_input_is_named():
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        mmdit_speed.run(mmdit_speed.Settings(shape="tinny"))
    with pytest.raises(UserError, match="unknown device"):
        mmdit_speed.run(mmdit_speed.Settings(device="gpu"))
