import json
import sys
from importlib import util

import pytest
import torch
import transformers as hf

from smalti.core.errors import UserError
from smalti.tokenizers.vision_backends import BACKENDS, CLIP, HALF, IMAGENET, SHIPPED_NAMES, load_teacher
from smalti.tokenizers.vision_encoder import VisionTransformer

SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 24, "patch_size": 8,
}  # fmt: skip
MODELS = {
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SHAPE)),
    "dinov2_with_registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=3)
    ),
    "dinov3_vit": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SHAPE, num_register_tokens=3)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SHAPE)),
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=SHAPE, text_config=TEXT, projection_dim=8)),
    "clip_vision_model": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SHAPE)),
    "siglip": lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=SHAPE, text_config=TEXT)),
    "siglip_vision_model": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SHAPE)),
    "vit_mae": lambda: hf.ViTMAEForPreTraining(
        hf.ViTMAEConfig(**SHAPE, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                        decoder_intermediate_size=16)
    ),
    "ijepa": lambda: hf.IJepaModel(hf.IJepaConfig(**SHAPE)),
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30,
    "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LEADING = {"dinov2_with_registers": 4, "dinov3_vit": 4, "ijepa": 0, "siglip": 0, "siglip_vision_model": 0}


def saved(family: str, folder, colours=None):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    for name, parameter in model.named_parameters():  # a norm that is left out, or a shift of places, must show
        if "norm" in name.lower() or "position" in name or "cls" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    model.save_pretrained(folder)
    if colours is not None:
        text = json.dumps({"image_mean": colours[0], "image_std": colours[1]})
        (folder / "preprocessor_config.json").write_text(text)
    return model


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


def test_every_family_has_a_model_here():
    assert MODELS.keys() == BACKENDS.keys()


def test_it_gives_the_patch_tokens_of_the_library_after_the_last_norm(family, tmp_path):
    model = saved(family, tmp_path, HALF)
    teacher = load_teacher(tmp_path)
    pixels = torch.rand(2, 3, 24, 24) * 2 - 1
    tokens = teacher(pixels)
    assert teacher.dim == 16
    assert teacher.grid(24, 24) == (3, 3)
    assert tokens.shape == (2, 9, 16)
    vision = getattr(model, "vision_model", getattr(model, "vit", model))
    given = {"noise": torch.arange(9.0).expand(2, -1)} if family == "vit_mae" else {}
    if family == "vit_mae":
        vision.config.mask_ratio = 0.0
    with torch.no_grad():
        wanted = vision(pixel_values=pixels, **given).last_hidden_state[:, LEADING.get(family, 1) :]
        wanted = vision.post_layernorm(wanted) if family.startswith("clip") else wanted
    assert torch.allclose(tokens, wanted, atol=1e-5)


def test_twice_the_native_grid_gives_twice_the_tokens_a_side(family, tmp_path):
    saved(family, tmp_path, HALF)
    pixels = torch.rand(1, 3, 24, 24)
    teacher = load_teacher(tmp_path, tokens=(6, 6))
    assert teacher(pixels).shape == (1, 36, 16)
    assert load_teacher(tmp_path, tokens=(2, 6))(pixels).shape == (1, 12, 16)


def test_patches_stay_in_their_order_and_none_is_hidden(family, tmp_path):
    """Changing one patch changes its own token most, whatever the family does to its patches in training."""
    saved(family, tmp_path, HALF)
    teacher = load_teacher(tmp_path)
    pixels = torch.zeros(1, 3, 24, 24)
    changed = pixels.clone()
    changed[..., 8:16, 16:] = torch.rand(3, 8, 8) * 2 - 1
    moved = (teacher(changed) - teacher(pixels)).norm(dim=-1)[0]
    assert moved.argmax() == 1 * 3 + 2
    assert torch.equal(teacher(changed), teacher(changed))


def test_it_is_frozen_and_runs_in_half_precision(tmp_path):
    saved("dinov2", tmp_path)
    teacher = load_teacher(tmp_path).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixels = torch.rand(1, 3, 24, 24)
    full = teacher(pixels)
    half = teacher.to(torch.bfloat16)(pixels)
    assert half.dtype == torch.float32
    assert torch.allclose(full, half, atol=0.2)


@pytest.mark.parametrize(("family", "wanted"), [("dinov2", IMAGENET), ("clip_vision_model", CLIP), ("siglip", HALF)])
def test_colours_are_those_of_the_family_unless_the_folder_states_them(family, wanted, tmp_path):
    saved(family, tmp_path / "bare")
    teacher = load_teacher(tmp_path / "bare")
    assert torch.allclose(teacher.mean.flatten(), torch.tensor(wanted[0]))
    assert torch.allclose(teacher.std.flatten(), torch.tensor(wanted[1]))
    stated = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    saved(family, tmp_path / "stated", stated)
    assert torch.allclose(load_teacher(tmp_path / "stated").mean.flatten(), torch.tensor(stated[0]))


def test_a_plain_transformer_must_state_its_colours(tmp_path):
    saved("vit", tmp_path)
    with pytest.raises(UserError, match=r"preprocessor_config\.json is missing"):
        load_teacher(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": 3}')
    with pytest.raises(UserError, match="does not state"):
        load_teacher(tmp_path)


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="did you mean 'vit-self'"):
        load_teacher("vit-slef")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2_like"}')
    with pytest.raises(UserError, match=r"unknown family of vision models .* 'dinov2_like'"):
        load_teacher(tmp_path)
    saved("dinov2", tmp_path / "one")
    saved("ijepa", tmp_path / "two")
    (tmp_path / "one" / "model.safetensors").replace(tmp_path / "two" / "model.safetensors")
    with pytest.raises(UserError, match="are missing"):
        load_teacher(tmp_path / "two")
    with pytest.raises(UserError, match="cannot read the vision model"):
        load_teacher(tmp_path / "one")


def test_untrained_ones_are_controls():
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    one, other = load_teacher("random", tokens=(8, 8)), load_teacher("random", tokens=(8, 8))
    assert torch.equal(one(pixels), other(pixels))
    assert one(pixels).shape == (1, 64, 192)
    assert load_teacher("random", tokens=(16, 16))(pixels).shape == (1, 256, 192)


def test_the_shape_for_timing_is_that_of_dinov2_b():
    teacher = load_teacher("random-dinov2-b", tokens=(2, 2))
    assert teacher.dim == 768
    assert teacher.preprocess(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 28, 28)
    assert teacher(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 768)
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 86_580_480


def test_a_folder_of_ours(tmp_path):
    model = VisionTransformer.untrained(depth=1, heads=2, head_dim=8, base_size=4)
    model.save_pretrained(tmp_path / "model")
    teacher = load_teacher(tmp_path)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(teacher(pixels), model(pixels), atol=1e-5)


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_the_shipped_ones(name):
    teacher = load_teacher(name, tokens=(8, 8))
    tokens = teacher(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert tokens.shape == (2, 64, 192)
    assert tokens.isfinite().all()
    assert teacher.grid(128, 128) == (8, 8)


TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_features": 192,
    "pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}


def test_without_timm_its_models_are_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(UserError, match="pip install timm"):
        load_teacher(tmp_path)


def test_a_model_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    teacher = load_teacher(tmp_path)
    with torch.no_grad():
        wanted = model.forward_features(teacher.preprocess(pixels))[:, 1:]
    assert torch.allclose(teacher(pixels), wanted, atol=1e-4)
    assert load_teacher(tmp_path, tokens=(28, 28))(pixels).shape == (1, 784, 192)
    assert load_teacher(tmp_path, tokens=(2, 3))(pixels).shape == (1, 6, 192)
