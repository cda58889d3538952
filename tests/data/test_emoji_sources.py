import numpy as np
import pytest
from PIL import Image

from smalti.core.errors import UserError
from smalti.data.emoji_sources import _svg, concept_of, emoji_key, rasterise, style_source


def test_keys_drop_the_presentation_selector():
    assert emoji_key("2764-FE0F-200D-1F525") == "2764-200d-1f525"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f3c3", "1f3c3-200d-2640"),  # person, woman running
        ("1f3c3", "1f3c3-200d-2642-200d-27a1"),  # man running: facing right
        ("1f9d1-200d-2695", "1f469-200d-2695"),  # health worker, woman health worker
        ("1f9d3", "1f474"),  # older person, old man
        ("1f46a", "1f468-200d-1f469-200d-1f467-200d-1f466"),  # family
        ("1f46a", "1f469-200d-1f466"),
        ("1f491", "1f469-200d-2764-200d-1f468"),  # couple with heart
        ("1f1f3-1f1f4", "1f1e7-1f1fb"),  # the flags of Norway and Bouvet Island
    ],
)
def test_near_duplicates_share_a_concept(one, other):
    assert concept_of(one) == concept_of(other)


@pytest.mark.parametrize(
    ("one", "other"), [("1f34e", "1f34f"), ("1f9d1-200d-2695", "1f9d1-200d-1f373"), ("1f9d1", "1f9d2")]
)
def test_different_things_do_not(one, other):
    assert concept_of(one) != concept_of(other)


def test_a_picture_of_another_shape_is_centred_on_a_transparent_square(tmp_path):
    Image.new("RGBA", (20, 10), (255, 0, 0, 255)).save(tmp_path / "wide.png")
    drawn = rasterise(tmp_path / "wide.png", 8)
    assert drawn.shape == (8, 8, 4)
    assert (drawn[2:6] == (255, 0, 0, 255)).all()
    assert (drawn[:2, :, 3] == 0).all()
    assert (drawn[6:, :, 3] == 0).all()


def test_svg_bodies_are_drawn_with_their_box_and_flip():
    pytest.importorskip("resvg_py")
    icons = {
        "width": 8,
        "height": 8,
        "icons": {"left": {"body": '<rect width="4" height="8" fill="#f00"/>'}},
        "aliases": {"right": {"parent": "left", "hFlip": True}},
    }
    left, right = rasterise(_svg(icons, "left"), 8), rasterise(_svg(icons, "right"), 8)
    assert (left[:, :4] == (255, 0, 0, 255)).all()
    assert (left[:, 4:, 3] == 0).all()
    assert np.array_equal(right, left[:, ::-1])


def test_unknown_styles_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'twemoji'"):
        style_source("twemojis", 64)


def test_large_noto_comes_from_vectors():
    assert style_source("noto", 64) != style_source("noto", 128)
