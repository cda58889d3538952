import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from smalti.core.errors import UserError
from smalti.core.seeds import generators_for
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.zoo import loader
from smalti.zoo.loader import load_model, load_part, model_card, model_folder, model_names, save_model, weights_hash

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_models, tmp_path):
    """A copy of the text model that a test may break."""
    return shutil.copytree(tiny_models["text"], tmp_path / "broken")


def change_index(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))


def change_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize("kind", ["text", "labels", "plain"])
def test_a_saved_model_is_read_back_bit_for_bit(tiny_models, tmp_path, kind):
    pipe = load_model(tiny_models[kind])
    again = load_model(save_model(pipe, tmp_path / "again", {"recipe": "test"}))
    for part in ("transformer", "autoencoder"):
        one, other = getattr(pipe, part).state_dict(), getattr(again, part).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert weights_hash(getattr(pipe, part)) == weights_hash(getattr(again, part))
    assert {key: pipe.config[key] for key in again.config} == dict(again.config)
    assert not pipe.transformer.training
    pictures = [
        one("a cat" if kind == "text" else None, num_inference_steps=2, generator=generators_for([1]), output_type="pt")
        for one in (pipe, again)
    ]
    assert torch.equal(pictures[0].images, pictures[1].images)


def test_the_folder_of_a_training_will_do(tiny_models, tmp_path):
    shutil.copytree(tiny_models["plain"], tmp_path / "run" / "model")
    assert model_folder(tmp_path / "run") == tmp_path / "run" / "model"
    assert model_card(tmp_path / "run")["recipe"] == "test"


def test_smaller_weights_keep_the_statistics_of_latents(tiny_models, tmp_path):
    pipe = load_model(tiny_models["text"])
    folder = save_model(pipe, tmp_path / "half", {}, torch.bfloat16)
    stored = load_file(folder / "autoencoder/diffusion_pytorch_model.safetensors")
    assert stored["to_latent.weight"].dtype == torch.bfloat16
    assert torch.equal(stored["latents_mean"], pipe.autoencoder.latents_mean)
    again = load_model(folder)
    assert again.transformer.dtype == torch.float32
    assert torch.equal(
        again.transformer.proj_out.weight, pipe.transformer.proj_out.weight.to(torch.bfloat16).to(torch.float32)
    )
    assert pipe.transformer.dtype == torch.float32
    assert (folder / WEIGHTS).stat().st_mode & 0o044 == 0o044


def test_names(tmp_path, tiny_models, monkeypatch):
    monkeypatch.setattr(loader, "ZOO", tmp_path)
    shutil.copytree(tiny_models["text"], tmp_path / "emoji")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "smalti.json").write_text("{}")
    assert model_names() == ["emoji", "judge"]
    assert model_names(only_pipelines=True) == ["emoji"]
    assert load_model("emoji").config["styles"] == ["flat", "round"]
    with pytest.raises(UserError, match="did you mean 'emoji'"):
        load_model("emojii")
    with pytest.raises(UserError, match="draws nothing; choose one of: emoji"):
        load_model("judge")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model_index\.json is missing"):
        load_model(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("proj_out.bias"), r"1 missing \(such as proj_out\.bias\)"),
        (lambda weights: weights.update(more=torch.zeros(1)), r"1 extra \(such as more\)"),
        (lambda weights: weights.update({"proj_out.bias": torch.zeros(7)}), "1 of another shape"),
        (lambda weights: weights.clear() or weights.update(other=torch.zeros(1)), "missing.*extra"),
    ],
)
def test_weights_that_do_not_fit(model, change, message):
    change_weights(model, change)
    with pytest.raises(UserError, match=message):
        load_model(model)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_torn_weights(model, keep):
    whole = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(whole[:keep])
    with pytest.raises(UserError, match="it is torn or no safetensors file"):
        load_model(model)


def test_pickled_weights_are_not_read(model):
    (model / WEIGHTS).unlink()
    torch.save({"proj_out.bias": torch.zeros(1)}, model / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"a \.safetensors file is missing"):
        load_model(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "holds a StableDiffusionPipeline"),
        ({"transformer": ["os", "system"]}, r"is a os\.system; only models of smalti"),
        ({"transformer": ["posix", "system"]}, "only models of smalti"),
        ({"scheduler": ["subprocess", "Popen"]}, "only models of smalti"),
        ({"transformer": ["strange_module", "Strange"]}, "only models of smalti"),
        ({"transformer": ["diffusers", "DiffusionPipeline"]}, "only models of smalti"),
        ({"scheduler": ["diffusers", "DiffusionPipeline"]}, "no SchedulerMixin"),
        ({"transformer": ["smalti.backbones.mmdit", "nn"]}, "no ModelMixin"),
        ({"transformer": ["smalti.backbones.mmdit", "MMDiTX"]}, "does not have"),
        ({"transformer": ["smalti.backbones.nowhere", "MMDiT"]}, "does not have"),
        ({"transformer": ["smalti..strange_module", "MMDiT"]}, "only models of smalti"),
        ({"transformer": ["smalti.backbones.dit", "DiT"]}, "is not the config of a DiT"),
        ({"transformer": None}, "must be"),
        ({"transformer": "MMDiT"}, "must be"),
        ({"surprise": 1}, "does not fit this version"),
        ({"styles": ["one"]}, "1 styles for a transformer of 2"),
        ({"text_encoder": "t6"}, "unknown text encoder"),
    ],
)
def test_an_index_that_names_something_else(model, changes, message, tmp_path, monkeypatch):
    (tmp_path / "strange_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    change_index(model, **changes)
    with pytest.raises(UserError, match=message):
        load_model(model)
    assert "strange_module" not in sys.modules


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("text", ['{"a": ', "[]", '"x"', ""])
def test_torn_or_foreign_json(model, file, text):
    (model / file).write_text(text)
    with pytest.raises(UserError):
        load_model(model)


def test_a_config_that_makes_no_model(model):
    config = json.loads((model / "transformer/config.json").read_text())
    for changes in ({"heads": "three"}, {"heads": -1}, {"head_dim": 7}):
        (model / "transformer/config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match="does not describe a MMDiT"):
            load_model(model)


def test_a_full_disk_leaves_the_old_model(model, monkeypatch):
    pipe = load_model(model)
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    monkeypatch.setattr(loader, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device"):
        save_model(pipe, model, {})
    assert before == {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    assert [entry.name for entry in model.parent.iterdir()] == [model.name]


def test_a_single_part(tiny_autoencoder, tmp_path):
    part = load_part(tiny_autoencoder, ConvAutoencoder, torch.bfloat16)
    assert part.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        load_part(tmp_path, ConvAutoencoder)
