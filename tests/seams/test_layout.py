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
    "z-image": ["image", "register", "text", "register"], "krea2": ["text", "image"], "ideogram4": ["text", "image"],
    "glm-image": ["text", "image"], "ernie-image": ["image", "text"], "omnigen": ["text", "register", "image"],
    "flux3": ["text", "image", "register"], "bria-fibo2": ["text", "image", "register"],
    "minimax-h3": ["text", "image", "register"], "motif-video": ["image", "register", "text"],
}  # fmt: skip
CROSSED = ("wan", "ltx", "pixart", "hunyuan-dit", "latte", "allegro", "anyflow")
CLIPS = ("cogvideox", "hunyuan-video", "mochi", "minimax-h3", "motif-video")
FAMILIES = all_families()


def read(name):
    model, watch = build(FAMILIES[name]), WatchCores()
    with smalti.apply(model, watch):
        euler(model, FAMILIES[name], 1)
    return watch.seen


@pytest.mark.parametrize("name", JOINT)
def test_the_order_of_joint_sequences(name):
    # Refiners come first; cross-attention is none of a sequence to itself.
    last = next(call for call in reversed(read(name)) if call.layout == call.key_layout)
    assert [one.kind for one in last.layout.segments] == JOINT[name]
    grids = [one.grid for one in last.layout.segments if one.kind == "image"]
    assert grids == [(3 if name in CLIPS else 1, 4, 6)]


@pytest.mark.parametrize("name", CROSSED)
def test_cross_attention_is_told_from_self_attention(name):
    kinds = {(call.layout.segments[0].kind, call.key_layout.segments[0].kind) for call in read(name)}
    assert kinds == {("image", "image"), ("image", "text")}


def test_linear_attention_is_not_taken_for_softmax():
    assert {call.site.name for call in read("sana")} == {"attn2"}


def test_channels_may_stand_last():
    calls = [call for call in read("kandinsky5") if call.site.stack == "visual_transformer_blocks"]
    assert {one.grid for call in calls for one in call.layout.segments} == {(3, 4, 6)}


def test_attention_in_pieces_has_a_layout_for_each_piece():
    """Text attends to what stands before it, then the image to all; two calls of one attention."""
    calls = [call for call in read("qwen-image-21") if call.site.index == 0]
    assert [[one.kind for one in call.layout.segments] for call in calls] == [["text"], ["image"]]
    assert [[one.kind for one in call.key_layout.segments] for call in calls] == [["text"], ["text", "image"]]
    assert [call.site.occurrence for call in calls] == [0, 1]


def test_sound_beside_a_video_is_told_from_it():
    kinds = {call.site.name: (call.layout.segments[0].kind, call.key_layout.segments[0].kind) for call in read("ltx2")}
    assert kinds == {
        "attn1": ("image", "image"), "attn2": ("image", "text"), "audio_attn1": ("register", "register"),
        "audio_attn2": ("register", "text"), "audio_to_video_attn": ("image", "register"),
        "video_to_audio_attn": ("register", "image"),
    }  # fmt: skip


def test_attention_that_later_blocks_have_alone_is_read():
    assert {call.site.index for call in read("bria-fibo2") if call.site.name == "cross_attention"} == {1}
