"""What is read from a model against what is known of it; the table is an expectation, the code knows no class."""

import sys
from pathlib import Path

import pytest
from small_models import WatchCores

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import all_families, build, euler

import smalti

JOINT = {
    "flux": ["text", "image"], "flux2": ["text", "image"], "chroma": ["text", "image"], "qwen-image": ["text", "image"],
    "cogvideox": ["text", "image"], "cogview3plus": ["text", "image"], "cogview4": ["text", "image"],
    "lumina2": ["text", "image"], "mmdit": ["text", "image"], "auraflow": ["register", "text", "image"],
    "sd3": ["image", "text"], "hunyuan-video": ["image", "text"], "mochi": ["image", "text"],
    "z-image": ["image", "register", "text", "register"],
}  # fmt: skip
CROSSED = ("wan", "ltx", "pixart", "hunyuan-dit", "latte", "allegro")
FAMILIES = all_families()


def read(name):
    model, watch = build(FAMILIES[name]), WatchCores()
    with smalti.apply(model, watch):
        euler(model, FAMILIES[name], 1)
    return watch.seen


@pytest.mark.parametrize("name", JOINT)
def test_the_order_of_joint_sequences(name):
    last = read(name)[-1]  # refiners come first
    assert [one.kind for one in last.layout.segments] == JOINT[name]
    assert last.layout == last.key_layout
    grids = [one.grid for one in last.layout.segments if one.kind == "image"]
    assert grids == [(3 if name in ("cogvideox", "hunyuan-video", "mochi") else 1, 4, 6)]


@pytest.mark.parametrize("name", CROSSED)
def test_cross_attention_is_told_from_self_attention(name):
    kinds = {(call.layout.segments[0].kind, call.key_layout.segments[0].kind) for call in read(name)}
    assert kinds == {("image", "image"), ("image", "text")}


def test_linear_attention_is_not_taken_for_softmax():
    assert {call.site.name for call in read("sana")} == {"attn2"}
