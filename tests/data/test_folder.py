import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core.errors import UserError
from smalti.data.buckets import batches
from smalti.data.folder import load_folder


def draw(path: Path, colour="red", size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def reasons(found):
    return {one.file: one.reason for one in found.skipped}


def test_a_plain_folder_is_unconditional(tmp_path):
    draw(tmp_path / "b.png")
    draw(tmp_path / "a.JPG")
    draw(tmp_path / "deep" / "c.webp")
    (tmp_path / "notes.md").write_text("not a picture")
    found = load_folder(tmp_path)
    assert found.files == ("a.JPG", "b.png", "deep/c.webp")
    assert found.captions is None
    assert found.labels is None
    assert found.label_names == ()
    assert found.skipped == ()


def test_sub_folders_are_labels(tmp_path):
    for name in ("cat/1.png", "dog/1.png", "dog/far/2.png", "stray.png"):
        draw(tmp_path / name)
    found = load_folder(tmp_path)
    assert found.label_names == ("cat", "dog")
    assert found.labels == [0, 1, 1]
    assert found.captions is None
    assert "sub-folders" in reasons(found)["stray.png"]


def test_texts_beside_pictures_are_captions(tmp_path):
    for name in ("cat/1.png", "dog/1.png", "dog/2.png", "dog/3.png", "dog/4.png"):
        draw(tmp_path / name)
    (tmp_path / "cat" / "1.txt").write_text("\ufeffa  cat\non a mat \n", encoding="utf-8")
    (tmp_path / "dog" / "1.txt").write_text("ein Hund, süß", encoding="utf-8")
    (tmp_path / "dog" / "2.txt").write_text(" \n")
    (tmp_path / "dog" / "4.txt").write_bytes("süß".encode("latin-1"))
    found = load_folder(tmp_path)
    assert found.files == ("cat/1.png", "dog/1.png")
    assert found.captions == ["a cat on a mat", "ein Hund, süß"]
    assert found.labels is None
    told = reasons(found)
    assert told["dog/2.txt"] == "the caption is empty"
    assert "cannot be read" in told["dog/4.txt"]
    assert all("no caption" in told[f"dog/{i}.png"] for i in (2, 3, 4))


def test_metadata_lines_are_captions_and_bad_lines_are_reported(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        draw(tmp_path / name)
    (tmp_path / "a.txt").write_text("the text file loses")
    draw(tmp_path.parent / "outside.png")
    lines = [
        json.dumps({"file_name": "a.png", "text": "an a", "further": 1}),
        json.dumps({"file_name": "./sub/c.png", "text": "a c"}),
        json.dumps({"file_name": "missing.png", "text": "x"}),
        json.dumps({"file_name": "../outside.png", "text": "x"}),
        json.dumps({"file_name": str(tmp_path / "b.png"), "text": "x"}),
        json.dumps({"file_name": "b.png"}),
        "{torn",
        "",
        json.dumps({"file_name": "a.png", "text": "again"}),
        json.dumps({"file_name": "b.png", "text": " "}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = load_folder(tmp_path)
    assert dict(zip(found.files, found.captions or [])) == {"a.png": "an a", "sub/c.png": "a c"}
    told = reasons(found)
    assert told["metadata.jsonl:3"] == "there is no picture missing.png"
    assert told["metadata.jsonl:4"] == "../outside.png leaves the folder"
    assert "leaves the folder" in told["metadata.jsonl:5"]
    assert '"text"' in told["metadata.jsonl:6"]
    assert told["metadata.jsonl:7"].startswith("no json")
    assert told["metadata.jsonl:9"] == "a.png is named twice"
    assert "empty" in told["metadata.jsonl:10"]
    assert "no caption" in told["b.png"]
    assert len(told) == 8


def test_captions_of_which_none_is_usable_are_refused_not_ignored(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file": "a.png"}\n')
    with pytest.raises(UserError, match=r"none can be used; the first: metadata.jsonl:1"):
        load_folder(tmp_path)


def test_broken_files_are_skipped_by_name(tmp_path):
    draw(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    found = load_folder(tmp_path)
    assert found.files == ("good.png",)
    assert list(reasons(found)) == ["empty.png", "text.jpg", "torn.png"]


def test_folders_without_a_usable_picture_are_refused(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        load_folder(tmp_path / "file")
    with pytest.raises(UserError, match="no pictures in"):
        load_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 pictures .* a.png: the file is empty"):
        load_folder(tmp_path)


def test_hidden_files_and_loops_of_links_are_harmless(tmp_path):
    draw(tmp_path / "sub" / "a.png")
    draw(tmp_path / ".cache" / "b.png")
    draw(tmp_path / "sub" / "._c.png")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path, target_is_directory=True)
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    draw(elsewhere / "d.png")
    (tmp_path / "linked").symlink_to(elsewhere, target_is_directory=True)
    assert load_folder(tmp_path).files == ("linked/d.png", "sub/a.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_locked_sub_folder_is_reported(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "locked" / "b.png")
    (tmp_path / "locked").chmod(0)
    try:
        assert "cannot be read" in reasons(load_folder(tmp_path))["locked"]
    finally:
        (tmp_path / "locked").chmod(0o755)


def test_pixels_are_upright_cropped_and_in_the_unit_range(tmp_path):
    Image.new("RGBA", (50, 50), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    draw(tmp_path / "red.png", (255, 0, 0))
    draw(tmp_path / "tall.jpg", "blue", size=(100, 200))
    found = load_folder(tmp_path, size=64, multiple=16)
    assert found.shapes == ((64, 64), (64, 64), (96, 48))
    pixels = found.pixels(torch.tensor([1, 0]))
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[0], torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 64, 64))
    assert (pixels[1] == 1).all()
    assert found.pixels([2]).shape == (1, 3, 96, 48)
    with pytest.raises(ValueError, match="2 shapes"):
        found.pixels([1, 2])
    assert {len(batch) for batch in batches(found.shapes, 2, seed=0)} == {1, 2}


def test_a_picture_lost_after_the_check_is_named(tmp_path):
    draw(tmp_path / "a.png")
    found = load_folder(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png .* the file is missing"):
        found.pixels([0])


def test_the_hash_follows_the_pictures(tmp_path):
    draw(tmp_path / "a.png")
    first = load_folder(tmp_path)
    assert load_folder(tmp_path).hash == first.hash
    assert load_folder(tmp_path, size=128).hash != first.hash
    draw(tmp_path / "a.png", "blue")
    assert load_folder(tmp_path).hash != first.hash


def test_sizes_are_checked_before_pictures(tmp_path):
    with pytest.raises(UserError, match="no multiple of 16"):
        load_folder(tmp_path, size=70)


def test_many_small_pictures_are_quick(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(100):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / f"{i:03d}.png")
    found = load_folder(tmp_path)
    assert len(found) == 100
    assert found.pixels(range(100)).shape == (100, 3, 64, 64)
