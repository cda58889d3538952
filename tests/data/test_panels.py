"""Sets: what they share they really share, captions do not tell it, and mixing up loses that alone."""

import numpy as np
import pytest
import torch

from smalti.core.errors import UserError
from smalti.data.emoji import EmojiItem, EmojiSet, load_emoji
from smalti.data.panels import COLOURS, PanelSet, colour_sets, mixed_up, storyboards, style_sets
from smalti.ops.canvas import PanelLayout


@pytest.fixture(scope="module")
def pictures():
    return load_emoji("train", topics=["hearts", "clocks", "weather"])


def rows_of(panel, pictures):
    return [i for i in range(len(pictures)) if torch.equal(panel, pictures.pixels([i])[0])]


def test_a_style_set_shows_different_concepts_by_one_vendor(pictures):
    sets = style_sets(pictures, 12, panels=3, seed=1)
    assert len(sets) == 12
    for one in sets:
        assert len(set(one.captions)) == 3
        assert len(set(one.shared)) == 1
        for panel, caption, style in zip(one.panels, one.captions, one.shared, strict=True):
            items = [pictures.items[row] for row in rows_of(panel, pictures)]
            assert any((item.label, item.style) == (caption, style) for item in items)
    assert {one.shared[0] for one in sets} == {item.style for item in pictures.items}
    again = style_sets(pictures, 12, panels=3, seed=1)
    assert all(torch.equal(one.panels, other.panels) for one, other in zip(sets, again))
    assert any(one.captions != other.captions for one, other in zip(sets, style_sets(pictures, 12, 3, seed=2)))


def test_mixing_up_keeps_panels_and_their_captions_and_loses_what_was_shared(pictures):
    sets = style_sets(pictures, 40)
    mixed = mixed_up(sets)
    assert [one.captions[0] for one in mixed] == [one.captions[0] for one in sets]
    assert sorted(one.captions[1] for one in mixed) == sorted(one.captions[1] for one in sets)
    assert sum(len(set(one.shared)) == 1 for one in mixed) < 20
    whole = {one.captions[1]: one.panels[1] for one in sets}
    for one in mixed[:5]:
        labels = {pictures.items[row].label for row in rows_of(one.panels[1], pictures)}
        assert one.captions[1] in labels or torch.equal(one.panels[1], whole[one.captions[1]])
    with pytest.raises(UserError, match="at least 2"):
        mixed_up(sets[:1])


def test_a_colour_set_has_one_colour_beside_white(pictures):
    for one in colour_sets(pictures, 6):
        assert one.summary == f"all {one.shared[0]}"
        wanted = torch.tensor(COLOURS[one.shared[0]]) / 127.5 - 1
        for panel in one.panels:
            pixels = panel.flatten(1).T
            painted = pixels[(pixels < 0.999).any(1)]
            assert len(painted) > 100
            assert torch.allclose(painted, wanted.expand_as(painted), atol=1e-5)


def test_a_storyboard_shows_one_clip_in_the_order_of_time():
    frames = np.zeros((2, 16, 8, 8, 4), np.uint8)
    frames[..., 3] = 255
    frames[..., 0] = np.arange(16)[None, :, None, None] * 10
    items = tuple(EmojiItem(str(i), f"thing {i}", (), "g", "s", "fluent-3d", False, str(i)) for i in range(2))
    sets = storyboards(EmojiSet(items, frames, "hash"), panels=4)
    assert [one.shared[0] for one in sets] == ["0", "1"]
    red = (sets[0].panels[:, 0, 0, 0] + 1) * 127.5
    assert red.round().tolist() == [0, 40, 80, 120]
    assert sets[1].captions[2] == "thing 1, moment 3"
    with pytest.raises(UserError, match="choose 2 to 16"):
        storyboards(EmojiSet(items, frames, "hash"), panels=17)


def test_mistakes_are_named(pictures):
    with pytest.raises(UserError, match="give one of each"):
        PanelSet(torch.zeros(2, 3, 8, 8), ("a",), ("x", "x"))
    with pytest.raises(UserError, match="ask for at least 1"):
        style_sets(pictures, 0)
    one = PanelSet(torch.zeros(2, 3, 8, 8), ("a", "b"), ("x", "x"))
    assert one.canvas(PanelLayout(2, 1)).shape == (3, 16, 8)
