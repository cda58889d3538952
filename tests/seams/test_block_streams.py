"""Blocks of every family: a method that acts on them is exact when it does nothing, or the streams are refused."""

import sys
from pathlib import Path

import pytest
import torch
from small_models import SkipBlock

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import build, euler, readable_families

import smalti
from smalti.core.errors import Refusal

FAMILIES = readable_families()


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_of_blocks(name):
    model = build(FAMILIES[name])
    plain = euler(model, FAMILIES[name], 2)
    reason = None
    with smalti.apply(model, SkipBlock.neutral()):
        try:
            assert torch.equal(euler(model, FAMILIES[name], 2), plain)
        except Refusal as refusal:
            reason = str(refusal)
    if reason is not None:
        assert "the token streams of" in reason
        pytest.skip(reason)
    with smalti.apply(model, SkipBlock()):
        skipped = euler(model, FAMILIES[name], 2)
    assert torch.isfinite(skipped).all()
    assert not torch.equal(skipped, plain)
    assert torch.equal(euler(model, FAMILIES[name], 2), plain)


def test_tokens_along_the_first_axis_are_refused():
    model = build(FAMILIES["ernie-image"])
    with (
        pytest.raises(Refusal, match=r"layers\.0 .* along the first axis of \(29, 1, 32\)"),
        smalti.apply(model, SkipBlock()),
    ):
        euler(model, FAMILIES["ernie-image"], 1)


def test_what_a_block_gives_besides_its_streams_is_kept():
    """LTX-2: video and sound go through one block; both come back."""
    watch = SkipBlock.neutral()
    model = build(FAMILIES["ltx2"])
    with smalti.apply(model, watch):
        euler(model, FAMILIES["ltx2"], 1)
    assert watch.seen[0][1] == {"image": (1, 72, 16), "register": (1, 7, 8)}
