import json
import warnings

import numpy as np
import pytest
from PIL import Image

from smalti.core.errors import UserError
from smalti.tasks import text_to_image
from smalti.tasks.text_to_image import Request, draw
from smalti.zoo.loader import load_model, save_model

STEPS = 3


def request(model, out, *prompts, **options):
    return Request(prompts, str(model), out, **{"steps": STEPS, **options})


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_one_picture_is_one_file_with_its_settings(tiny_models, tmp_path):
    asked = request(tiny_models["text"], tmp_path / "new" / "a.png", "a green apple", seed=7, style="round", guidance=3)
    result = draw(asked)
    assert names(tmp_path / "new") == ["a.png"]
    assert result["sheet"] is None
    assert result["pictures"] == [
        {"file": str(asked.out), "prompt": "a green apple", "style": "round", "seed": 7},
    ]
    picture = Image.open(asked.out)
    assert picture.size == (64, 64)
    stored = json.loads(picture.text["smalti"])
    assert stored == {
        "model": str(tiny_models["text"]), "steps": STEPS, "solver": "euler", "guidance": 3, "size": [64, 64],
        "prompt": "a green apple", "style": "round", "seed": 7,
    }  # fmt: skip
    before = asked.out.read_bytes()
    draw(asked)
    assert asked.out.read_bytes() == before


def test_a_picture_is_the_same_in_a_batch_of_four(tiny_models, tmp_path):
    draw(request(tiny_models["text"], tmp_path / "alone.png", "a green apple", seed=7))
    draw(request(tiny_models["text"], tmp_path / "four.png", "red heart", "a green apple", "cat", "dog", seed=7))
    alone = pixels(tmp_path / "alone.png")
    assert abs(pixels(tmp_path / "four-02.png") - alone).max() <= 1
    for other in ("four-01.png", "four-03.png"):
        assert abs(pixels(tmp_path / other) - alone).max() > 1
    draw(request(tiny_models["text"], tmp_path / "next.png", "a green apple", seed=6, count=2))
    assert abs(pixels(tmp_path / "next-02.png") - alone).max() <= 1


def test_several_pictures_lie_beside_their_sheet(tiny_models, tmp_path):
    result = draw(request(tiny_models["text"], tmp_path / "a.png", "cat", "dog", style="all", count=2, seed=3))
    assert names(tmp_path) == ["a-01.png", *(f"a-0{n}.png" for n in range(2, 9)), "a.png"]
    assert result["sheet"] == str(tmp_path / "a.png")
    drawn = [(one["prompt"], one["style"], one["seed"]) for one in result["pictures"]]
    assert drawn == [(p, s, n) for p in ("cat", "dog") for s in ("flat", "round") for n in (3, 4)]
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.width > 8 * 128
    assert json.loads(sheet.text["smalti"])["steps"] == STEPS


def test_more_pictures_than_a_batch(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_image, "BATCH", 2)
    with pytest.warns(UserWarning, match="these words were cut") as caught:
        warnings.simplefilter("default")
        draw(request(tiny_models["text"], tmp_path / "a.png", " ".join(["many words"] * 9), count=5))
    assert len(names(tmp_path)) == 6
    assert len({str(one.message) for one in caught}) == 1


def test_labels_and_nothing(tiny_models, tmp_path):
    for style in (None, "round"):
        draw(request(tiny_models["labels"], tmp_path / f"{style}.png", style=style))
    assert abs(pixels(tmp_path / "None.png") - pixels(tmp_path / "round.png")).max() > 1
    draw(request(tiny_models["labels"], tmp_path / "first.png", style="flat"))
    assert (pixels(tmp_path / "first.png") == pixels(tmp_path / "None.png")).all()
    result = draw(request(tiny_models["plain"], tmp_path / "plain.png", count=2))
    assert [one["style"] for one in result["pictures"]] == [None, None]


@pytest.mark.parametrize("solver", ["heun", "dpm++", "unipc", "sde"])
def test_other_solvers(tiny_models, tmp_path, solver):
    draw(request(tiny_models["text"], tmp_path / "euler.png", "cat"))
    result = draw(request(tiny_models["text"], tmp_path / "a.png", "cat", solver=solver))
    assert result["solver"] == solver
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "euler.png")).any()


def test_other_sizes(tiny_models, tmp_path):
    result = draw(request(tiny_models["text"], tmp_path / "a.png", "cat", size="48x72"))
    assert Image.open(tmp_path / "a.png").size == (72, 48)
    assert result["size"] == [48, 72]


@pytest.mark.parametrize(
    ("kind", "prompts", "options", "message"),
    [
        ("text", (), {}, "no prompt was given"),
        ("text", ("cat", " "), {}, "' ' is empty"),
        ("text", ("cat",), {"style": "rond"}, "unknown style 'rond'; did you mean 'round'"),
        ("text", ("cat",), {"steps": 0}, "steps is 0; it must be a whole number from 1"),
        ("text", ("cat",), {"count": 0}, "count is 0"),
        ("text", ("cat",), {"seed": -1}, "seed -1 is out of range"),
        ("text", ("cat",), {"seed": 2**63}, "out of range"),
        ("text", ("cat",), {"seed": 2**63 - 1, "count": 2}, "out of range"),
        ("text", ("cat",), {"size": "60"}, "choose a multiple of 8"),
        ("text", ("cat",), {"size": "0"}, "choose a multiple of 8"),
        ("text", ("cat",), {"size": "big"}, "size 'big' is not understood"),
        ("text", ("cat",), {"size": "64x64x64"}, "is not understood"),
        ("text", ("cat",), {"solver": "eulr"}, "did you mean 'euler'"),
        ("text", ("cat",), {"guidance": float("nan")}, "guidance scale of nan"),
        ("labels", ("cat",), {}, "takes no prompt; leave it out, choose a --style"),
        ("plain", (), {"style": "flat"}, "has no styles"),
        ("plain", (), {"guidance": 2.0}, "no condition to guide by"),
    ],
)
def test_bad_input_writes_nothing(tiny_models, tmp_path, kind, prompts, options, message):
    with pytest.raises(UserError, match=message):
        draw(request(tiny_models[kind], tmp_path / "new" / "a.png", *prompts, **options))
    assert not names(tmp_path)


def test_places_are_proved_before_any_work(tiny_models, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "b-02.png").mkdir()
    monkeypatch.setattr(text_to_image.TextToImagePipeline, "__call__", None)
    for name, message in [("b.png", "b-02.png is a folder"), ("a.jpg", "does not end in .png")]:
        with pytest.raises(UserError, match=message):
            draw(request(tiny_models["text"], tmp_path / name, "cat", count=2))
    monkeypatch.setattr(text_to_image, "load_model", None)
    for name, message in [("file/a.png", "Not a directory"), (f"{'x' * 300}.png", "too long")]:
        with pytest.raises(UserError, match=message):
            draw(request(tiny_models["text"], tmp_path / name, "cat"))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        draw(request(tiny_models["text"], tmp_path / "folder.png", "cat"))
    assert names(tmp_path) == ["b-02.png", "file", "folder.png"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_nothing(tiny_models, tmp_path, monkeypatch, failing):
    calls, save = [], Image.Image.save

    def full(image, *rest, **named):
        calls.append(image)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        save(image, *rest, **named)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        draw(request(tiny_models["text"], tmp_path / "a.png", "cat", "dog"))
    assert len(calls) == failing
    assert not names(tmp_path)


def test_a_model_of_clips_writes_pictures_that_move(tiny_models, tmp_path):
    pipe = load_model(tiny_models["text"])
    pipe.register_to_config(frames=3)
    model = save_model(pipe, tmp_path / "model", {"recipe": "test", "metrics": {}})
    result = draw(request(model, tmp_path / "clip.png", "a dog", "a cat"))
    files = [picture["file"] for picture in result["pictures"]]
    with Image.open(files[0]) as clip:
        assert (clip.n_frames, clip.size, clip.info["duration"]) == (3, (64, 64), 1000)
        assert json.loads(clip.text["smalti"])["prompt"] == "a dog"
        frames = []
        for frame in range(3):
            clip.seek(frame)
            frames.append(np.asarray(clip.convert("RGB")))
    assert not np.array_equal(frames[0], frames[1])
    assert Image.open(result["sheet"]).size[0] > 2 * 64
