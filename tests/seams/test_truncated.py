"""A model that ends early gives the tokens of the whole one, runs less, and leaves that one alone."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import GRIDS, all_families, build, call

from smalti.core.errors import UserError
from smalti.seams.anatomy import read_anatomy
from smalti.seams.taps import Taps
from smalti.seams.truncated import truncated

FAMILIES = all_families()


def fail(*_):
    pytest.fail("a block of the whole model ran")


@pytest.mark.parametrize("name", ["our-dit", "mmdit", "flux", "sd3", "pixart", "dit", "wan"])
def test_tokens_are_those_of_the_whole_model_and_later_blocks_do_not_run(name):
    family = FAMILIES[name]
    model = build(family)
    arguments = family.inputs(0, 2, GRIDS["small"])
    blocks = read_anatomy(model).blocks
    for depth in range(1, len(blocks)):
        taps = Taps(model, [depth])
        with torch.no_grad():
            call(model, family, arguments, 0.5)
        wanted = taps.taken.tokens[depth]
        taps.remove()
        twin = truncated(model, depth)
        taps = Taps(twin, [depth])
        with torch.no_grad():
            call(twin, family, arguments, 0.5)  # reads the layout
        hooks = [block.module.register_forward_pre_hook(fail) for block in blocks]  # the twin has its own
        with torch.no_grad():
            call(twin, family, arguments, 0.5)
        assert torch.equal(taps.taken.tokens[depth], wanted)
        assert len(read_anatomy(twin).blocks) == depth
        for hook in hooks:
            hook.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(read_anatomy(model).blocks) == len(blocks)


def test_weights_are_shared():
    model = build(FAMILIES["our-dit"])
    twin = truncated(model, 1)
    assert twin.blocks[0].attn.to_qkv.weight is model.blocks[0].attn.to_qkv.weight
    with torch.no_grad():
        model.x_embedder.weight.add_(1)
    assert twin.x_embedder.weight is model.x_embedder.weight
    assert type(twin) is type(model)
    assert twin.config == model.config


def test_depths_that_are_not_there_are_named():
    with pytest.raises(UserError, match="1 to 2"):
        truncated(build(FAMILIES["our-dit"]), 3)
