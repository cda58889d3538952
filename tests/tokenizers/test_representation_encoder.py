"""Features without the last norm's weights, of the patches alone, at the encoder's own size."""

import pytest
import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

from smalti.core.errors import UserError
from smalti.tokenizers.representation_encoder import RepresentationEncoder, last_norm
from smalti.tokenizers.vision_backends import OwnTeacher, load_teacher
from smalti.tokenizers.vision_encoder import VisionTransformer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def own():
    model = VisionTransformer(patch_size=4, depth=1, heads=2, head_dim=8, base_size=4)
    nn.init.normal_(model.final_norm.weight)
    nn.init.normal_(model.final_norm.bias)
    return OwnTeacher(model, (4, 4))


def folder(tmp_path, model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_every_token_has_mean_0_and_variance_1_and_the_teacher_given_is_unchanged():
    teacher, pixels = own(), torch.rand(2, 3, 16, 16) * 2 - 1
    before = teacher(pixels)
    z = RepresentationEncoder(teacher)(pixels)
    assert z.shape == (2, 16, 4, 4)
    assert z.mean(1).abs().max() < 1e-4
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(2, 4, 4), rtol=1e-2, atol=1e-2)
    assert torch.equal(teacher(pixels), before)
    undone = z.flatten(2).mT * teacher.encoder.final_norm.weight + teacher.encoder.final_norm.bias
    torch.testing.assert_close(undone, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dinov2 with registers", "siglip"])
def test_the_norm_of_other_families_is_found_and_class_token_and_registers_are_cut_off(tmp_path, kind):
    if kind == "siglip":  # its head has a norm behind the last one
        model = SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=32))
        norm = model.vision_model.post_layernorm if hasattr(model, "vision_model") else model.post_layernorm
        prefix = 0
    else:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4))
        norm, prefix = model.layernorm, 5
    teacher = load_teacher(folder(tmp_path, model.eval()), (2, 2))
    assert torch.equal(last_norm(teacher).weight, norm.weight)
    encoder = RepresentationEncoder(teacher)
    pixels = torch.rand(1, 3, 28, 28) * 2 - 1
    z = encoder(pixels)
    assert z.shape == (1, 16, 2, 2)
    assert z.mean(1).abs().max() < 1e-4
    with torch.no_grad():
        norm.weight.fill_(1.0)
        norm.bias.zero_()
        whole = model(pixel_values=teacher.preprocess(pixels)).last_hidden_state
    assert whole.shape[1] == prefix + 4
    torch.testing.assert_close(z.flatten(2).mT, whole[:, prefix:], rtol=1e-4, atol=1e-4)


def test_the_resize_belongs_to_it():
    encoder = RepresentationEncoder(own())
    assert encoder(torch.rand(1, 3, 64, 64)).shape == (1, 16, 4, 4)


def test_what_ends_without_a_layer_norm_is_refused():
    teacher = own()
    teacher.encoder.final_norm = nn.Identity()
    with pytest.raises(UserError, match="without a layer norm"):
        RepresentationEncoder(teacher)
