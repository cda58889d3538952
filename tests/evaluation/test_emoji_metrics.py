import torch

from smalti.data.emoji import load_emoji
from smalti.evaluation.emoji_metrics import blur, concept_numbers, spread, take


def test_spread_is_even():
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, 10) == [0, 1, 2]


def test_blur_keeps_the_mean_and_loses_detail():
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    soft = blur(pixels)
    assert (soft.mean() - pixels.mean()).abs() < 0.02
    assert soft.std() < 0.3 * pixels.std()


def test_pictures_of_a_concept_share_a_number():
    hearts = load_emoji("held-out", topics=["hearts"])
    numbers = concept_numbers(hearts)
    assert len(numbers) == len(hearts)
    assert len(numbers.unique()) == len({item.concept for item in hearts.items})
    part = take(hearts, [1, 3])
    assert [item.key for item in part.items] == [hearts.items[1].key, hearts.items[3].key]
