"""Teachers that ship know more than untrained ones; unknown ones are named."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.data.emoji import load_emoji
from smalti.tokenizers.vision_backends import SHIPPED_NAMES, load_teacher


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_shipped_teachers_tell_pictures_of_one_concept_in_another_style(name):
    pictures = load_emoji("held-out", topics=["animals"])
    noto = {item.concept: row for row, item in enumerate(pictures.items) if item.style == "noto"}
    pairs = [
        (noto[item.concept], row)
        for row, item in enumerate(pictures.items)
        if item.style == "twemoji" and item.concept in noto
    ]

    def right(teacher):
        vectors = torch.nn.functional.normalize(teacher(pictures.pixels()).mean(1), dim=1)
        vectors = vectors - vectors.mean(0)
        one, other = (vectors[[pair[side] for pair in pairs]] for side in (0, 1))
        return ((one @ other.T).argmax(1) == torch.arange(len(pairs))).float().mean()

    assert right(load_teacher(name, (8, 8))) > right(load_teacher("random", (8, 8)))


def test_untrained_teachers_are_the_same_for_a_seed_and_leave_the_generator_alone():
    pixels = torch.rand(1, 3, 64, 64)
    before = torch.get_rng_state()
    one, other = load_teacher("random", (8, 8))(pixels), load_teacher("random", (8, 8))(pixels)
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_teacher_that_is_not_there_is_named():
    with pytest.raises(UserError, match="vit-caption"):
        load_teacher("vit-captoin", (8, 8))
