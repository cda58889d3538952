"""Clips: made from miniature packages in a temporary cache and read back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core.errors import UserError
from smalti.data.clips import DATASETS, PARTS, load_clips, prepare, read_clip

NAMES = {"groups": {"0": "animals-nature", "1": "component"}, "subgroups": {"0": "animal-mammal", "1": "skin-tone"}}


def animation(path, frames):
    """A bar that moves to the right and is gone from the left: frame f is opaque from column 4 * f on."""
    pictures = []
    for frame in range(frames):
        rgba = np.zeros((256, 256, 4), np.uint8)
        rgba[:, 4 * frame :] = (255, 0, 0, 255)
        pictures.append(Image.fromarray(rgba))
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"save_all": True, "append_images": pictures[1:], "duration": 40} if frames > 1 else {}
    pictures[0].save(path, lossless=True, **more)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path))
    captions = tmp_path / "npm" / "emojibase-data-17.0.0"
    listed = [
        {"hexcode": code, "label": label, "order": order, "group": 0, "subgroup": 0, "tags": ["pet"]}
        for order, (code, label) in enumerate([("1F431", "cat face"), ("1F436", "dog face"), ("1F43A", "wolf")])
    ]
    for path, content in ((captions / "meta" / "groups.json", NAMES), (captions / "en" / "data.json", listed)):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    for part in PARTS:
        (tmp_path / "npm" / f"{part.package[1:].replace('/', '-')}-1.0.0" / "assets").mkdir(parents=True)
    assets = tmp_path / "npm" / "lobehub-fluent-emoji-anim-2-1.0.0" / "assets"
    for name, frames in (("1f431", 32), ("1f436", 16), ("1f43a", 1), ("1f984", 16)):
        animation(assets / f"{name}.webp", frames)
    return tmp_path


def test_clips_are_prepared_and_read_back(packages):
    with pytest.raises(UserError, match="smalti data get clips"):
        load_clips()
    path = prepare()
    assert path == DATASETS["clips"].location()
    assert (path.parent / "licenses").is_dir()
    clips = load_clips("all")
    assert [item.label for item in clips.items] == ["cat face", "dog face"]  # the wolf stands still, one has no caption
    assert clips.images.shape == (2, 16, 64, 64, 4)
    assert len(load_clips("all", topics=["animals"])) == 2
    pixels = clips.pixels()
    assert pixels.shape == (2, 3, 16, 64, 64)
    green = pixels[:, 1, :, 32]  # (clips, frames, columns): 1 on white, -1 in red
    edges = (green > 0).sum(-1)
    assert torch.equal(edges[0], torch.arange(16) * 2)  # every second of 32 frames
    assert torch.equal(edges[1], torch.arange(16))
    assert clips.hash == load_clips("all").hash


def test_what_stands_still_is_no_clip(tmp_path):
    animation(tmp_path / "still.webp", 1)
    assert read_clip(tmp_path / "still.webp") is None
