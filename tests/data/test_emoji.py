"""The emoji set as it ships."""

from collections import Counter

import numpy as np
import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.files import file_hash
from smalti.data.emoji import STYLES, TOPICS, captions, load_emoji, on_white
from smalti.data.emoji_prepare import SHIPPED, is_held_out


@pytest.fixture(scope="module")
def everything():
    return load_emoji("all")


def test_all_styles_are_there_in_order(everything):
    counts = Counter(item.style for item in everything.items)
    assert list(counts) == list(STYLES)
    assert counts == {"noto": 1905, "twemoji": 1892, "fluent-3d": 1852, "fluent-flat": 1594}
    assert everything.images.shape == (7243, 64, 64, 4)
    assert everything.hash == file_hash(SHIPPED)


def test_no_concept_lies_on_both_sides_of_the_split(everything):
    sides = {side: load_emoji(side) for side in ("train", "held-out")}
    concepts = {side: {item.concept for item in one.items} for side, one in sides.items()}
    assert not concepts["train"] & concepts["held-out"]
    assert len(sides["train"]) + len(sides["held-out"]) == len(everything)
    assert 0.08 < len(sides["held-out"]) / len(everything) < 0.12
    assert all(item.held_out == is_held_out(item.concept) for item in everything.items)


def test_no_held_out_picture_is_drawn_in_training(everything):
    small = {style: everything.select(styles=[style]) for style in STYLES}
    for style, one in small.items():
        seen = {picture.tobytes() for picture in one.select("train").images}
        copies = [i for i, picture in enumerate(one.select("held-out").images) if picture.tobytes() in seen]
        assert not copies, style


def test_pictures_belong_to_their_labels(everything):
    """Colours that the labels promise, in every style: the order of pictures and items cannot have slipped."""
    for key, channel in (("2764", 0), ("1f49a", 1), ("1f499", 2)):  # red, green, blue heart
        hearts = everything.select(keys=[key])
        assert len(hearts) == 4
        middle = hearts.images[:, 24:40, 24:40, :3].mean((1, 2))
        assert (middle.argmax(1) == channel).all(), key


def test_pixels_lie_on_white_in_the_unit_range(everything):
    chosen = everything.select(keys=["1f34e"])
    pixels = chosen.pixels([1, 0])
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert (pixels[:, :, 0, 0] == 1).all()
    assert torch.equal(chosen.pixels(torch.tensor([0])), chosen.pixels()[:1])


def test_alpha_mixes_with_white():
    rgba = torch.tensor([[0, 0, 0, 255], [0, 0, 0, 51], [255, 0, 0, 0]], dtype=torch.uint8).reshape(3, 1, 1, 4)
    expected = torch.tensor([[-1.0, -1, -1], [0.6, 0.6, 0.6], [1, 1, 1]])
    assert torch.allclose(on_white(rgba).reshape(3, 3), expected)


def test_loading_a_part_equals_selecting_it(everything):
    part = load_emoji("held-out", styles=["fluent-flat", "noto"], topics=["food", "hearts"])
    chosen = everything.select("held-out", styles=["fluent-flat", "noto"], topics=["food", "hearts"])
    assert part.items == chosen.items
    assert np.array_equal(part.images, chosen.images)


def test_topics_are_what_they_say(everything):
    assert set(TOPICS) == {"smileys", "animals", "food", "hearts", "clocks", "weather"}
    for topic in TOPICS:
        for split in ("train", "held-out"):
            assert {item.style for item in everything.select(split, topics=[topic]).items} == set(STYLES), (
                topic,
                split,
            )
    labels = {topic: {item.label for item in everything.select(topics=[topic]).items} for topic in TOPICS}
    assert {"grinning face"} <= labels["smileys"]
    assert {"dog face", "cat face", "penguin"} <= labels["animals"]
    assert {"green apple", "hot beverage"} <= labels["food"]
    assert all("heart" in label for label in labels["hearts"])
    assert {"three o’clock", "alarm clock"} <= labels["clocks"]
    assert {"snowflake", "rainbow"} <= labels["weather"]


def test_groups_subgroups_and_a_single_name_select(everything):
    assert (
        everything.select(styles="noto", topics="clocks").items
        == load_emoji("all", styles=["noto"], topics=["clocks"]).items
    )
    fruit = everything.select(subgroups=["food-fruit"])
    assert {item.subgroup for item in fruit.items} == {"food-fruit"}
    assert {item.group for item in everything.select(groups=["flags"]).items} == {"flags"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "unknown split 'test'"),
        ({"styles": ["notto"]}, "did you mean 'noto'"),
        ({"topics": ["foods"]}, "did you mean 'food'"),
        ({"variant": "openmoj"}, "did you mean 'openmoji'"),
        ({"styles": []}, "no emoji has"),
    ],
)
def test_wrong_names_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        load_emoji(**arguments)


def test_an_unknown_key_is_refused(everything):
    with pytest.raises(UserError, match="unknown key"):
        everything.select(keys=["1f34"])


def test_captions_begin_with_the_label_and_never_name_the_style(everything):
    for item in everything.items:
        found = captions(item)
        assert found[0] == item.label
        assert len(found) == len(set(found)) >= 1
        assert found == captions(item)
        assert not any(style in caption for caption in found for style in ("noto", "twemoji", "fluent"))
    assert sum(len(captions(item)) for item in everything.items) > 4 * len(everything)


@pytest.mark.parametrize(
    ("key", "phrase"),
    [
        ("1f34f", "a green apple"),
        ("1f419", "an octopus"),
        ("1f984", "a unicorn"),
        ("1f347", "grapes"),
        ("1f1eb-1f1f7", "the flag of France"),
        ("1f552", "a clock showing three o’clock"),
        ("1f60a", "a smiling face with smiling eyes"),
        ("1f44c", "an OK hand"),
    ],
)
def test_phrases_read_naturally(everything, key, phrase):
    assert captions(everything.select(keys=[key]).items[0])[1 if phrase != "grapes" else 0] == phrase
