"""Joint captions: markers always stand, names repeat, and what is cut is the end of the longest panel."""

import pytest

from smalti.core.errors import UserError
from smalti.data.joint_captions import JointCaptioner, describe_request
from smalti.ops.canvas import PanelLayout


def test_the_parts_stand_in_order():
    joint = JointCaptioner.for_layout(PanelLayout(1, 2), "[PAIR]")
    assert joint(["a cat", "a dog"]) == "[PAIR] [LEFT] a cat [RIGHT] a dog"
    assert joint(["a cat", "a dog"], "flat style") == "[PAIR] [LEFT] a cat [RIGHT] a dog, flat style"
    assert JointCaptioner.for_layout(PanelLayout(2, 2)).markers[2] == "[BOTTOM-LEFT]"
    scenes = JointCaptioner.for_layout(PanelLayout(3, 1), "[MOVIE-SHOTS]", scenes=True)
    assert scenes(["a", "b", "c"]) == "[MOVIE-SHOTS] [SCENE-1] a [SCENE-2] b [SCENE-3] c"
    assert JointCaptioner.for_layout(PanelLayout(1, 3)).markers == ("[SCENE-1]", "[SCENE-2]", "[SCENE-3]")


def test_a_name_is_the_same_word_in_every_panel():
    joint = JointCaptioner.for_layout(PanelLayout(1, 2))
    text = joint(["{who} with {other}", "{who} asleep"], names={"who": "Leo", "other": "Mia"})
    assert text == "[LEFT] <Leo> with <Mia> [RIGHT] <Leo> asleep"
    with pytest.raises(UserError, match=r"\{who\}, who has no name"):
        joint(["{who}", "a cat"])
    with pytest.raises(UserError, match="'Mia' stands in no caption"):
        joint(["a dog", "a cat"], names={"other": "Mia"})


def test_no_marker_is_ever_cut():
    long = "one two three four five six seven eight nine ten"
    joint = JointCaptioner.for_layout(PanelLayout(1, 2), "[P]", length=9)
    assert joint([long, long]) == "[P] [LEFT] one two three [RIGHT] one two three"
    assert joint(["short", long]) == "[P] [LEFT] short [RIGHT] one two three four five"
    assert joint([long, "short"], summary="and more") == "[P] [LEFT] one two three four five [RIGHT] short"
    assert joint(["a", "b"], summary="one two three four five").endswith("b, one two three")
    with pytest.raises(UserError, match="take 3 of 4 tokens"):
        JointCaptioner.for_layout(PanelLayout(1, 2), "[P]", length=4)


def test_the_encoder_reads_all_markers_of_what_was_fitted():
    from smalti.tokenizers.text_encoder import MiniLMEncoder

    encoder = MiniLMEncoder(length=24)

    def count(text):
        return len(encoder.tokenizer(text, add_special_tokens=False).input_ids)

    joint = JointCaptioner.for_layout(PanelLayout(1, 2), "[SET]", length=22, count=count)
    text = joint(["grinning face with very large and very shiny eyes and a hat"] * 2)
    assert "[RIGHT]" in text
    assert count(text) <= 22
    assert count(text) > 14


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="give one for each"):
        JointCaptioner.for_layout(PanelLayout(1, 2))(["a"])
    with pytest.raises(UserError, match="one of its own"):
        JointCaptioner(("[A]", "[A]"))


def test_a_vision_language_model_is_asked_for_the_same_form():
    request = describe_request(JointCaptioner.for_layout(PanelLayout(2, 1), "[PAIR]"))
    assert "[PAIR] [TOP] ... [BOTTOM] ..." in request
