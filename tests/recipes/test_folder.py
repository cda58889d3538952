import json
import os
import signal
import socket
import time
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.data.folder import load_folder
from smalti.recipes import folder_autoencoder
from smalti.recipes.folder import PRESETS, FolderRecipe, overfitting, start_transformer, train
from smalti.recipes.folder_autoencoder import base_autoencoder
from smalti.tasks.text_to_image import Request, draw
from smalti.training import checkpoints
from smalti.training.config import TrainConfig
from smalti.training.mup import MuReadout
from smalti.training.progress import read_log
from smalti.zoo.loader import load_model, model_card

TINY = {
    "text": {"heads": 1, "head_dim": 16, "num_single": 1, "axes_dims_rope": [4, 6, 6], "ffn_ratio": 1},
    "other": {"heads": 1, "head_dim": 16, "depth": 1, "ffn_ratio": 1},
}


def recipe(data, tokenizer, kind="other", **changes):
    settings = {
        "steps": 3,
        "batch": 4,
        "log_every": 1,
        "sample_every": 3,
        "eval_every": 2,
        **changes.pop("training", {}),
    }
    return FolderRecipe(
        data=str(data), tokenizer=None if tokenizer is None else str(tokenizer), training=TrainConfig(**settings),
        transformer=TINY[kind], **changes,
    )  # fmt: skip


def caption(folder, text="a disc number {}"):
    for number, file in enumerate(sorted(folder.glob("*.png"))):
        file.with_suffix(".txt").write_text(text.format(number))
    return folder


def weights(folder):
    return {path.parent.name: load_file(path) for path in sorted(folder.glob("*/*.safetensors"))}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_captions_of_mixed_shapes(make_pictures, tiny_autoencoder, tmp_path, capsys):
    data = caption(make_pictures(tmp_path / "data", 9, sizes=((64, 64), (60, 100), (200, 120))))
    (data / "03.txt").write_text(" ".join(["many words"] * 30))
    (data / "08.png").write_bytes(b"torn")
    model = train(recipe(data, tiny_autoencoder, "text"), tmp_path / "run")
    errors = capsys.readouterr().err
    assert "skipped 08.png: no PNG, JPEG or WebP picture" in errors
    assert "8 pictures of 3 shapes, conditioned on captions" in errors
    assert errors.count("cut") == 1
    assert "the last words of 1 of 8 captions were cut" in errors
    assert "training pictures" in errors.splitlines()[-1]
    pipe = load_model(model)
    assert (pipe.config["text_encoder"], pipe.config["styles"], pipe.config["size"]) == ("minilm", [], 64)
    card = model_card(model)
    assert card["recipe"] == "folder"
    assert (card["images_seen"], card["settings"]["training"]["steps"]) == (12, 3)
    assert card["loss"] > 0
    assert set(card["metrics"]) >= {"to nearest training picture", "copied"}
    assert [file.name for file in (tmp_path / "run" / "transformer" / "samples").iterdir()] == ["step-000003.png"]
    draw(Request(("a disc",), str(tmp_path / "run"), tmp_path / "a.png", steps=2, size="48x80"))


@pytest.mark.parametrize("kind", ["text", "other"])
def test_a_teacher_of_pictures_of_several_shapes(make_pictures, tiny_autoencoder, tmp_path, kind):
    data = make_pictures(tmp_path / "data", 8, sizes=((64, 64), (60, 100)))
    if kind == "text":
        caption(data)
    asked = recipe(data, tiny_autoencoder, kind, shift=2, teacher="vit-self")
    model = train(asked, tmp_path / "run")
    lines = [line for line in read_log(tmp_path / "run" / "transformer" / "log.jsonl") if "loss" in line]
    for line in lines:
        assert line["loss"] == pytest.approx(line["objective"] - 0.5 * line["alignment cosine"], rel=1e-4)
    card = model_card(model)
    assert card["settings"]["teacher"] == "vit-self"
    assert card["objective"] == lines[-1]["objective"]
    names = weights(model)["transformer"]
    assert not any("projector" in name for name in names)
    with pytest.raises(UserError, match="vit-caption"):
        train(replace(asked, teacher="vit-captoin"), tmp_path / "other")


def test_labels(make_pictures, tiny_autoencoder, tmp_path):
    for start, label in enumerate(("round one", "other")):
        make_pictures(tmp_path / "data" / label, 4, start=10 * start)
    model = train(recipe(tmp_path / "data", tiny_autoencoder), tmp_path / "run")
    pipe = load_model(model)
    assert pipe.config["styles"] == ["other", "round one"]
    assert pipe.config["default_guidance"] == 2.0
    draw(Request((), str(model), tmp_path / "a.png", steps=2, style="round one"))


def test_nothing_and_a_larger_size(make_pictures, tiny_autoencoder, tmp_path):
    model = train(recipe(make_pictures(tmp_path / "data"), tiny_autoencoder, size=192), tmp_path / "run")
    pipe = load_model(model)
    assert (pipe.config["styles"], pipe.config["text_encoder"], pipe.config["default_guidance"]) == ([], None, 1.0)
    assert (pipe.config["size"], pipe.transformer.config["patch_size"]) == (192, 2)
    draw(Request((), str(model), tmp_path / "a.png", steps=1))


def test_any_autoencoder_of_diffusers(make_pictures, tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "kl")  # fmt: skip
    data = make_pictures(tmp_path / "data", 4)
    model = train(recipe(data, tmp_path / "kl"), tmp_path / "run")
    pipe = load_model(model)
    assert (pipe.autoencoder.factor, pipe.transformer.config["in_channels"]) == (2, 4)
    assert pipe.transformer.config["patch_size"] == 2
    assert pipe.autoencoder.latents_std.min() != 1
    again = train(recipe(data, model / "autoencoder"), tmp_path / "again")
    assert same(weights(again)["autoencoder"], weights(model)["autoencoder"])


@pytest.mark.parametrize(("enough", "is_trained"), [(99.0, True), (0.0, False)])
def test_the_autoencoder_that_ships(make_pictures, tiny_autoencoder, tmp_path, monkeypatch, capsys, enough, is_trained):
    monkeypatch.setattr(folder_autoencoder, "SHIPPED", tiny_autoencoder)
    asked = recipe(make_pictures(tmp_path / "data"), None, enough=enough)
    asked = replace(asked, autoencoder_training=TrainConfig(steps=4, batch=2, ema=0))
    before, after = load_file(next(tiny_autoencoder.glob("*.safetensors"))), weights(train(asked, tmp_path / "run"))
    assert torch.equal(before["to_latent.weight"], after["autoencoder"]["to_latent.weight"]) != is_trained
    assert not torch.equal(before["latents_mean"], after["autoencoder"]["latents_mean"])
    errors = capsys.readouterr().err
    assert ("it is trained on them" in errors) == is_trained
    assert errors.count("the autoencoder reaches") == 1 + is_trained


def test_held_out_pictures(make_pictures, tiny_autoencoder, tmp_path):
    data = make_pictures(tmp_path / "data", 200, sizes=((64, 64), (64, 64), (48, 96)))
    run = tmp_path / "run"
    model = train(recipe(data, tiny_autoencoder, training={"sample_every": 0, "seed": 1}), run)
    logged = [line["held_out_loss"] for line in read_log(run / "transformer" / "log.jsonl") if "held_out_loss" in line]
    assert len(logged) == 2
    assert model_card(model)["held_out_loss"] == logged[-1]


def test_a_rate_carried_over_has_factors_and_leaves_a_plain_model(make_pictures, tiny_autoencoder, tmp_path):
    asked = recipe(make_pictures(tmp_path / "data"), tiny_autoencoder, tuned_width=64)
    base, pictures = base_autoencoder(asked.tokenizer), load_folder(asked.data, 64, 8)
    started = start_transformer(asked, base, pictures)
    assert started.factors["blocks.0.attn.to_qkv.weight"].rate == 4  # a quarter as wide as where the rate was tuned
    assert start_transformer(replace(asked, tuned_width=None), base, pictures).factors is None
    torch.nn.init.normal_(started.model.proj_out.weight)
    x, t = torch.randn(1, 16, 8, 8), torch.rand(1)
    plain = started.plain(started.model)
    assert not any(isinstance(one, MuReadout) for one in plain.modules())
    torch.testing.assert_close(plain(x, t, Cond()), started.model(x, t, Cond()))


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [({}, "nothing was held out"), ({10: 0.8, 20: 0.6, 30: 0.9}, "lowest after step 20 (0.6000) and is 0.9000 now"),
     ({10: 0.8, 20: 0.6}, "was 0.6000 at the end, 0.8000 after step 10")],
)  # fmt: skip
def test_overfitting_is_said(tmp_path, losses, sentence):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step, "held_out_loss": loss}) + "\n" for step, loss in losses.items()))
    assert sentence in overfitting(log)


def test_a_folder_of_another_training_is_refused(make_pictures, tiny_autoencoder, tmp_path, capsys):
    asked, run = recipe(make_pictures(tmp_path / "data", 4), tiny_autoencoder), tmp_path / "run"
    model = train(asked, run, resume=True)
    assert f"there is nothing to resume in {run}; starting from the beginning" in capsys.readouterr().err
    first, card = weights(model), model_card(model)
    with pytest.raises(UserError, match="already holds a training; go on with --resume"):
        train(asked, run)
    assert same(weights(train(asked, run, resume=True))["transformer"], first["transformer"])
    assert model_card(model)["loss"] == card["loss"]
    with pytest.raises(UserError, match=r"settings\.size was 64, is 128"):
        train(replace(asked, size=128), run, resume=True)
    caption(tmp_path / "data")
    with pytest.raises(UserError, match="conditions_hash was"):
        train(replace(asked, transformer=TINY["text"]), run, resume=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "model").write_text("dear friend")
    for resume in (False, True):
        with pytest.raises(UserError, match="is not empty and holds no training"):
            train(replace(asked, data="nowhere"), tmp_path / "letters", resume)
    assert [file.name for file in (tmp_path / "letters").iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "nowhere is missing"),
        ({"data": ""}, "no folder of pictures was given"),
        ({"data": "empty"}, "no pictures in empty"),
        ({"data": "data", "size": 60}, "out of range; choose one from 64 to 512"),
        ({"data": "data", "size": 100}, "no multiple of 8; the nearest that is: 96"),
        ({"data": "data", "tokenizer": "nowhere"}, "no autoencoder in nowhere"),
        ({"data": "data", "tokenizer": None}, "does not ship with this installation"),
        ({"data": "data", "transformer": {"haeds": 2}}, "did you mean 'heads'"),
        ({"data": "data", "transformer": {"in_channels": 2}}, "unknown setting of the transformer"),
        ({"data": "data", "transformer": {"num_single": 2}}, "unknown setting of the transformer"),
        ({"data": "data", "transformer": {"heads": 3, "head_dim": 3}}, "make no DiT"),
        ({"data": "data", "transformer": {"patch_size": "a"}}, "patch_size is 'a'"),
    ],
)
def test_bad_input_writes_nothing(make_pictures, tiny_autoencoder, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder_autoencoder, "SHIPPED", tmp_path / "absent")
    make_pictures(tmp_path / "data", 2)
    (tmp_path / "empty").mkdir()
    asked = replace(recipe("", tiny_autoencoder), **changes)
    with pytest.raises(UserError, match=message) as caught:
        train(asked, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "empty"]


def test_places(make_pictures, tiny_autoencoder, tmp_path):
    data = make_pictures(tmp_path / "data", 2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="lies in the folder of the pictures"):
        train(recipe(data, tiny_autoencoder), data / "run")
    with pytest.raises(UserError, match="cannot write"):
        train(recipe(data, tiny_autoencoder), tmp_path / "file")
    for changes, message in [({"text_length": 3}, "from 4 to 512"), ({"guidance": -1.0}, "from 0")]:
        with pytest.raises(UserError, match=message):
            replace(PRESETS["cpu"], **changes)


def training(data, tokenizer, out, steps, *more):
    """Arguments of the command line for a tiny training."""
    settings = {"steps": steps, "batch": 4, "save_every": 2, "log_every": 1, "sample_every": 0, "warmup": 0}
    pairs = [f"training.{key}={value}" for key, value in settings.items()]
    pairs += [f"transformer.{key}={value}" for key, value in TINY["text"].items()]
    changes = [part for pair in pairs for part in ("--set", pair)]
    given = [] if tokenizer is None else ["--tokenizer", tokenizer]
    return ["train", "--data", data, "--out", out, *given, *changes, *more]


def wait(process, log, status=0):
    process.join(120)
    assert process.exitcode == status, (log.parent / f"{log.name}.err").read_text()


def test_killed_and_resumed_it_equals_an_uninterrupted_run(start_cli, make_pictures, tiny_autoencoder, tmp_path):
    data = caption(make_pictures(tmp_path / "data", 6, sizes=((64, 64), (48, 96))))
    whole = start_cli(training(data, tiny_autoencoder, tmp_path / "whole", 24), tmp_path / "log-whole")
    wait(whole, tmp_path / "log-whole")
    cut = start_cli(training(data, tiny_autoencoder, tmp_path / "cut", 24), tmp_path / "log-cut")
    deadline = time.monotonic() + 120
    while not checkpoints.steps(tmp_path / "cut" / "transformer" / "checkpoints"):
        assert time.monotonic() < deadline
        assert cut.exitcode is None, (tmp_path / "log-cut.err").read_text()
        time.sleep(0.01)
    os.kill(cut.pid, signal.SIGKILL)
    wait(cut, tmp_path / "log-cut", -signal.SIGKILL)
    assert not (tmp_path / "cut" / "model").exists()
    resume = ("--resume", "--json")
    again = start_cli(training(data, tiny_autoencoder, tmp_path / "cut", 24, *resume), tmp_path / "log-again")
    wait(again, tmp_path / "log-again")
    assert json.loads((tmp_path / "log-again.out").read_text()) == {"model": str(tmp_path / "cut" / "model")}
    one, other = weights(tmp_path / "whole" / "model"), weights(tmp_path / "cut" / "model")
    assert same(one["transformer"], other["transformer"])
    assert same(one["autoencoder"], other["autoencoder"])
    drawn = start_cli(
        ["generate", "a disc", "--model", tmp_path / "cut" / "model", "--steps", 2, "--out", tmp_path / "a.png"],
        tmp_path / "log-a",
    )
    wait(drawn, tmp_path / "log-a")
    assert (tmp_path / "a.png").is_file()
    assert f"--model {tmp_path / 'whole' / 'model'}" in (tmp_path / "log-whole.out").read_text()


def test_two_processes_train_as_one(start_cli, make_pictures, tiny_autoencoder, tmp_path):
    """Also the autoencoder, the caches and the embeddings; the first process alone writes and talks."""
    data = caption(make_pictures(tmp_path / "data", 6, sizes=((64, 64), (48, 96))))
    (data / "05.png").write_bytes(b"torn")
    (data / "04.txt").write_text(" ".join(["many words"] * 30))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environments = {
        "0": {**shared, "RANK": "0", "LOCAL_RANK": "0"},
        "1": {**shared, "RANK": "1", "LOCAL_RANK": "1"},
        "one": {},
    }
    short = ["--set", "enough=99", "--set", "autoencoder_training.steps=2", "--set", "autoencoder_training.warmup=0"]
    group = {}
    for name, environment in environments.items():
        out = tmp_path / ("one" if name == "one" else "two")
        asked = training(data, None, out, 6, *short)
        group[name] = start_cli(asked, tmp_path / f"log-{name}", {**environment, "TEST_SHIPPED": str(tiny_autoencoder)})
    for name, process in group.items():
        wait(process, tmp_path / f"log-{name}")
    for part in ("autoencoder-training", "transformer"):
        one, two = (read_log(tmp_path / name / part / "log.jsonl") for name in ("one", "two"))
        assert len(one) == len(two) > 0
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two)) < 1e-4
    assert not (tmp_path / "log-1.out").read_text()
    others = (tmp_path / "log-1.err").read_text().splitlines()
    assert all(line.startswith("[rank1]:[W") for line in others)  # torch's own, which the command switches off
    said = (tmp_path / "log-0.err").read_text()
    for line in ("skipped 05.png", "it is trained on them", "1 of 5 captions were cut"):
        assert said.count(line) == 1
    assert str(tmp_path / "two" / "model") in (tmp_path / "log-0.out").read_text()
    load_model(tmp_path / "two")


def test_a_full_disk_is_one_line_and_the_training_goes_on_later(start_cli, make_pictures, tiny_autoencoder, tmp_path):
    data, run = caption(make_pictures(tmp_path / "data", 4)), tmp_path / "run"
    process = start_cli(training(data, tiny_autoencoder, run, 2), tmp_path / "log", largest_file=20000)
    wait(process, tmp_path / "log", status=2)
    last = (tmp_path / "log.err").read_text().splitlines()[-1]
    assert last.startswith("smalti: cannot write")
    assert "too large" in last
    assert [file.name for file in run.iterdir()] == ["training.json"]
    wait(start_cli(training(data, tiny_autoencoder, run, 2, "--resume"), tmp_path / "log"), tmp_path / "log")
    load_model(run)
