import pytest
import torch

from smalti.core.errors import UserError
from smalti.data.emoji import load_emoji
from smalti.evaluation.rewards import (
    JudgeReward,
    brightness,
    colourfulness,
    contrast,
    darkness,
    edges,
    flatness,
    harmonic,
    with_floor,
)  # fmt: skip


def plain(red, green, blue, size=8):
    return torch.tensor([red, green, blue], dtype=torch.float32)[None, :, None, None].expand(1, 3, size, size)


def stripes(width):
    pixels = (torch.arange(16) // width % 2 * 2 - 1).float()
    return pixels[None, None, None].expand(1, 3, 16, 16)


def test_statistics_know_white_black_and_colour():
    white, black, red = plain(1, 1, 1), plain(-1, -1, -1), plain(1, -1, -1)
    assert brightness(torch.cat([white, black])).tolist() == pytest.approx([1, 0], abs=1e-6)
    assert darkness(black) == pytest.approx(1)
    assert brightness(red).item() == pytest.approx(0.299)
    assert colourfulness(torch.cat([white, black])).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert colourfulness(red).item() == pytest.approx(0.3 * (1 + 0.25) ** 0.5)
    assert not any(one(white).item() > 1e-6 for one in (contrast, edges))


def test_finer_stripes_have_more_edges_and_the_same_contrast():
    fine, coarse = stripes(2), stripes(8)
    assert edges(fine) > 3 * edges(coarse)
    assert flatness(fine) < flatness(coarse)
    assert torch.allclose(contrast(fine), contrast(coarse))


def test_each_picture_has_a_number_of_its_own():
    pictures = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for reward in (brightness, darkness, contrast, edges, flatness, colourfulness):
        together = reward(pictures, ["", "", ""])
        assert together.shape == (3,)
        assert torch.allclose(together[1:2], reward(pictures[1:2], [""]), atol=1e-6)


def test_the_judge_prefers_the_right_caption():
    emoji = load_emoji("held-out", styles=["noto"], topics=["food", "hearts"])
    pixels, captions = emoji.pixels(range(12)), [item.label for item in emoji.items[:12]]
    wrong = captions[1:] + captions[:1]
    similarity, confidence = JudgeReward(), JudgeReward(captions)
    for reward in (similarity, confidence):
        assert reward(pixels, captions).mean() > reward(pixels, wrong).mean() + 0.05
    assert ((confidence(pixels, captions) > 0) & (confidence(pixels, captions) < 1)).all()
    every = torch.stack([confidence(pixels, [caption] * 12) for caption in captions])
    assert torch.allclose(every.sum(0), torch.ones(12), atol=1e-4)
    with pytest.raises(UserError, match="a prompt for each picture"):
        similarity(pixels, captions[:3])


def test_rewards_combine():
    grey, white = plain(0, 0, 0), plain(1, 1, 1)
    both = harmonic(brightness, lambda pixels, prompts: torch.ones(len(pixels)))
    assert both(grey, [""]).item() == pytest.approx(2 / (1 / 0.5 + 1))
    with pytest.raises(UserError, match="positive"):
        harmonic(contrast)(white, [""])
    limited = with_floor(darkness, brightness, 0.8)
    assert limited(white, [""]).item() == pytest.approx(0, abs=1e-6)
    assert limited(grey, [""]).item() == pytest.approx(0.5 - 0.3)
