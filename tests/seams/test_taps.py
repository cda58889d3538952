"""Taps give the image tokens after a block, on every family alike, and change nothing."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import GRIDS, all_families, build, call

from smalti.core.errors import UserError
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
