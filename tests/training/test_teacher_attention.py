"""Where teachers look: ours, those of the transformers library and timm's, class tokens left out."""

import json
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "tokenizers"))
from test_vision_backends import HALF, LEADING, MODELS, saved

from smalti.core.errors import Refusal, UserError
from smalti.tokenizers.vision_backends import OwnTeacher, load_teacher
from smalti.tokenizers.vision_encoder import VisionTransformer
from smalti.training.teacher_attention import AttentionTeacher


def test_our_own_is_seen_before_the_softmax_and_left_without_hooks():
    encoder = VisionTransformer.untrained(depth=3, heads=2, head_dim=8, patch_size=8, base_size=3)
    pixels = torch.rand(2, 3, 24, 24) * 2 - 1
    view = AttentionTeacher(OwnTeacher(encoder), [2, 3])(pixels)
    assert torch.equal(view.tokens, OwnTeacher(encoder)(pixels))
    assert (view.grid, view.prefix, set(view.attention)) == ((3, 3), 0, {2, 3})
    with torch.no_grad():
        hidden = encoder.blocks[0](encoder.embed(pixels))
        q, k, _ = encoder.blocks[1].attn.to_qkv(encoder.blocks[1].norm_1(hidden)).unflatten(-1, (3, 2, 8)).unbind(2)
    wanted = torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5
    assert torch.allclose(view.attention[2].logits(), wanted, atol=1e-5)
    assert torch.allclose(view.maps(2, (3, 3)), wanted.softmax(-1), atol=1e-5)
    assert view.maps(2, (2, 2)).shape == (2, 2, 4, 4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


@pytest.mark.parametrize("family", MODELS)
def test_maps_of_the_transformers_library_are_its_own_without_what_precedes_the_patches(family, tmp_path):
    saved(family, tmp_path, HALF)
    teacher, pixels = load_teacher(tmp_path), torch.rand(2, 3, 24, 24) * 2 - 1
    view = AttentionTeacher(teacher, [1, 2])(pixels)
    leading = LEADING.get(family, 1)
    assert view.prefix == leading
    teacher.model.set_attn_implementation("eager")  # which returns its maps, after the softmax over all tokens
    given = {"noise": torch.arange(9.0).expand(2, -1)} if family == "vit_mae" else {}
    with torch.no_grad():
        theirs = teacher.model(pixel_values=teacher.preprocess(pixels), output_attentions=True, **given).attentions
    for block in (1, 2):
        patches = theirs[block - 1][..., leading:, leading:]
        wanted = patches / patches.sum(-1, keepdim=True)  # what a softmax without the others gives
        assert torch.allclose(view.maps(block, (3, 3)), wanted, atol=1e-5)
        assert torch.allclose(view.attention[block].logits().softmax(-1), theirs[block - 1], atol=1e-5)


@pytest.mark.skipif(util.find_spec("timm") is None, reason="timm is optional")
def test_maps_of_timm(tmp_path):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=48)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_args": {"img_size": 48}}))
    view = AttentionTeacher(load_teacher(tmp_path, tokens=(3, 3)), [12])(torch.rand(1, 3, 48, 48))
    assert view.prefix == 1
    assert view.maps(12, (3, 3)).shape == (1, 3, 9, 9)


def test_attention_that_cannot_be_seen_and_blocks_that_are_not_there_are_named(tmp_path):
    saved("dinov2", tmp_path, HALF)
    teacher = load_teacher(tmp_path)
    with pytest.raises(UserError, match="blocks 1 to 2"):
        AttentionTeacher(teacher, [3])
    teacher.model.set_attn_implementation("eager")
    with pytest.raises(Refusal, match="sdpa"):
        AttentionTeacher(teacher, [1])(torch.zeros(1, 3, 24, 24))
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
