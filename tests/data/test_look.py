import shutil

import torch
from PIL import Image

from smalti.data.folder import load_folder
from smalti.data.look import look, near_copies, thumbnail


def test_copies_and_near_copies_are_told_apart(make_pictures, tmp_path):
    data = make_pictures(tmp_path / "data", 6, sizes=((64, 64), (64, 64), (60, 100)))
    shutil.copy(data / "00.png", data / "20.png")
    Image.open(data / "01.png").save(data / "21.jpg", quality=95)
    for number, file in enumerate(sorted(data.glob("*.*"))):
        file.with_suffix(".txt").write_text(" ".join(["word"] * (number + 1)))
    pictures = load_folder(data)
    seen = look(pictures, range(len(pictures)))
    assert (seen.pictures, seen.copies, seen.near_copies, seen.compared) == (8, 1, 1, 7)
    assert seen.words == (1, 4.5, 8)
    assert sorted(seen.shapes.values()) == [2, 6]
    text = str(seen)
    for part in ("8 pictures", "2 shapes, most of them 64 x 64", "captions of 1 to 8 words (4.5 in the middle)",
                 "files that repeat another one: 1", "look like another one: 1 of 7"):  # fmt: skip
        assert part in text


def test_labels_are_counted(make_pictures, tmp_path):
    for start, label in enumerate(("few", "many")):
        make_pictures(tmp_path / "data" / label, 2 + 3 * start, start=10 * start)
    seen = look(load_folder(tmp_path / "data"), [0, 3])
    assert seen.labels == {"few": 2, "many": 5}
    assert "2 labels of 2 to 5 pictures" in str(seen)
    assert seen.words is None


def test_near_is_by_the_mean_difference():
    pixels = torch.rand(600, 3, 32, 32) * 2 - 1
    close, far = (pixels[7:8] + shift for shift in (2 * 1 / 255, 2 * 4 / 255))
    every = thumbnail(torch.cat([pixels, close, far]))
    assert near_copies(every) == 1
    assert near_copies(every[:-2]) == 0
