import pytest
import torch

from smalti.ops.guidance_terms import guide_away


def draws(count):
    return [torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(index)) for index in range(count)]


def test_the_sign_is_that_of_the_paper():
    plain, damaged = draws(2)
    assert torch.allclose(guide_away(plain, damaged, 2.0), (1 + 2) * plain - 2 * damaged, atol=1e-6)
    assert torch.equal(guide_away(plain, damaged, 0.0), plain)


@pytest.mark.parametrize("rescale", [0.0, 0.6])
def test_under_classifier_free_guidance_the_difference_counts_once(rescale):
    plain, damaged, uncond = draws(3)
    given = guide_away(plain, damaged, 2.0, rescale, guidance=5.0)
    total = uncond + 5 * (given - uncond)
    alone = guide_away(plain, damaged, 2.0, rescale) - plain
    assert torch.allclose(total, uncond + 5 * (plain - uncond) + alone, atol=1e-5)


def test_rescaling_gives_every_sample_its_spread_back():
    plain, damaged = draws(2)
    spread = plain.std((1, 2))
    wide = guide_away(plain, damaged, 6.0).std((1, 2))
    assert (wide > 2 * spread).all()
    assert torch.allclose(guide_away(plain, damaged, 6.0, 1.0).std((1, 2)), spread, atol=1e-5)
    half = guide_away(plain, damaged, 6.0, 0.5).std((1, 2))
    assert torch.allclose(half, (spread + wide) / 2, atol=1e-5)
