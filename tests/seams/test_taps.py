"""Taps give the image tokens after a block, on every family alike, and change nothing."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import GRIDS, all_families, build, call

from smalti.core.errors import Refusal, UserError
from smalti.seams.anatomy import read_anatomy
from smalti.seams.taps import Taps

FAMILIES = all_families()
NAMES = ("flux", "sd3", "pixart", "dit", "wan", "lumina2", "qwen-image", "mmdit", "our-dit")


def prediction(model, family, arguments, t):
    return call(model, family, arguments, t)[0]


@pytest.mark.parametrize("name", NAMES)
def test_image_tokens_follow_the_picture_and_carry_gradient(name):
    family = FAMILIES[name]
    model = build(family)
    arguments = family.inputs(0, 1, GRIDS["small"])
    x = arguments[family.sample]
    with torch.no_grad():
        plain = prediction(model, family, arguments, 0.5)
    depth = len(read_anatomy(model).blocks)
    taps = Taps(model, [1, depth])
    x = x.clone().requires_grad_()
    out = prediction(model, family, {**arguments, family.sample: x}, 0.5)
    assert torch.equal(out, plain)
    first, last = taps.taken.tokens[1], taps.taken.tokens[depth]
    assert taps.taken.grid is not None
    frames, rows, columns = taps.taken.grid
    assert first.shape[1] == last.shape[1] == frames * rows * columns
    (gradient,) = torch.autograd.grad(last.square().sum(), x)
    assert gradient.abs().sum() > 0
    taps.remove()
    with torch.no_grad():
        prediction(model, family, arguments, 0.7)
    assert taps.taken.tokens[depth] is last
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tokens_stand_where_they_stood_after_another_size_and_text():
    family = FAMILIES["mmdit"]
    model = build(family)
    taps = Taps(model, [2])
    joint = {}
    model.single_blocks[0].register_forward_hook(lambda module, args, output: joint.update(out=output))
    for size in ("small", "large", "small"):
        arguments = family.inputs(0, 2, GRIDS[size])
        prediction(model, family, arguments, 0.5)
        length = arguments["cond"].text.shape[1]
        assert torch.equal(taps.taken.tokens[2], joint["out"][:, length:])
        assert taps.taken.grid == (1, *GRIDS[size])


def test_a_block_that_is_not_there_is_named():
    with pytest.raises(UserError, match="blocks 1 to 3"):
        Taps(build(FAMILIES["mmdit"]), [4])


@pytest.mark.parametrize("name", [*NAMES, "cogvideox", "hunyuan-video", "hunyuan-dit"])
def test_logits_of_image_tokens_are_those_of_the_softmax(name):
    """The output that the kernel gave is what these logits and the values give, where there is no text beside."""
    family = FAMILIES[name]
    model = build(family)
    arguments = family.inputs(0, 2, GRIDS["small"])
    with torch.no_grad():
        plain = prediction(model, family, arguments, 0.5)
    depth = len(read_anatomy(model).blocks)
    taps = Taps(model, [], [1, depth])
    x = arguments[family.sample].clone().requires_grad_()
    out = prediction(model, family, {**arguments, family.sample: x}, 0.5)
    assert torch.equal(out, plain)
    frames, rows, columns = taps.taken.grid
    for one in (1, depth):
        logits = taps.taken.attention[one].logits()
        assert logits.shape[0] == out.shape[0] == 2
        assert logits.shape[2] == logits.shape[3] == frames * rows * columns
    (gradient,) = torch.autograd.grad(taps.taken.attention[depth].logits().square().sum(), x)
    assert gradient.abs().sum() > 0
    taps.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_logits_come_after_norm_and_rotation_and_leave_text_out():
    family = FAMILIES["mmdit"]
    model = build(family)
    arguments = family.inputs(0, 2, GRIDS["small"])
    seen, plain = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        seen.append((q, k))
        return plain(q, k, v, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = spy
    try:
        prediction(model, family, arguments, 0.5)
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
    taps = Taps(model, [], [1, 2, 3])
    prediction(model, family, arguments, 0.5)
    length = arguments["cond"].text.shape[1]
    for depth, (q, k) in zip((1, 2, 3), seen, strict=True):
        wanted = (q @ k.mT / q.shape[-1] ** 0.5)[:, :, length:, length:]
        assert torch.allclose(taps.taken.attention[depth].logits(), wanted, atol=1e-5)
    taps.remove()


def test_an_attention_without_scores_is_refused():
    family = FAMILIES["sana"]
    model = build(family)
    taps = Taps(model, [], [1])
    with pytest.raises(Refusal, match="0 calls of scaled_dot_product_attention"):
        prediction(model, family, family.inputs(0, 1, GRIDS["small"]), 0.5)
    taps.remove()


def test_a_model_that_raises_leaves_nothing_switched():
    family = FAMILIES["our-dit"]
    model = build(family)
    taps = Taps(model, [1], [1])
    arguments = family.inputs(0, 1, GRIDS["small"])
    hook = model.blocks[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prediction(model, family, arguments, 0.5)
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    hook.remove()
    prediction(model, family, arguments, 0.5)
    assert set(taps.taken.attention) == {1}
    taps.remove()


def test_taps_go_with_gradient_checkpointing():
    family = FAMILIES["our-dit"]
    model, gradients = build(family).requires_grad_(True).train(), []
    arguments = family.inputs(0, 2, GRIDS["small"])
    for is_on in (False, True):
        if is_on:
            model.enable_gradient_checkpointing()
        taps = Taps(model, [2], [1])
        out = prediction(model, family, arguments, 0.5)
        loss = out.square().mean() + taps.taken.attention[1].logits().log_softmax(-1)[..., 0].mean()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        taps.remove()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])
