"""The masks as tokens: who attends to whom, and how many keys that makes."""

import pytest
import torch

from smalti.ops.local_mask import MASKS, attended, local_layout


def seen(grid, mask, density, token):
    """Which tokens of the grid a token attends to."""
    return local_layout(grid, mask, density).token_mask(torch.device("cpu"))[token].reshape(grid)


@pytest.mark.parametrize("token", [0, 30, 100, 255])
def test_a_band_is_one_run_of_the_flattened_order_around_the_token(token):
    found = seen((1, 16, 16), "band", 0.08, token).flatten().nonzero().flatten()
    assert len(found) == 20
    assert found[-1] - found[0] == 19
    assert found[0] <= token <= found[-1]
    if 20 < token < 236:
        assert (found.float().mean() - token).abs() < 4  # runs of 4: exact up to the place inside one


@pytest.mark.parametrize("token", [0, 100, 255])
def test_a_window_is_a_rectangle_around_the_token(token):
    found = seen((1, 16, 16), "window", 0.12, token)[0].nonzero()
    sides = found.amax(0) - found.amin(0) + 1
    assert sides.prod() == len(found)
    assert sides.max() <= 2 * sides.min()
    row, column = token // 16, token % 16
    assert (found == torch.tensor([row, column])).all(1).any()


def test_frames_repeat_the_band_at_the_same_place_in_every_frame():
    found = seen((3, 6, 8), "frames", 0.2, 48 + 20)  # place 20 of the second frame
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    places = found[0].flatten().nonzero().flatten()
    assert places[-1] - places[0] == len(places) - 1
    assert places[0] < 20 < places[-1]
    band = seen((3, 6, 8), "band", 0.2, 48 + 20)
    assert not torch.equal(band[0], band[1])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grid", [(1, 16, 16), (1, 64, 64), (13, 30, 45), (2, 7, 11)])
@pytest.mark.parametrize("density", [0.031, 0.0625, 0.12])
def test_the_share_comes_near_and_is_told(grid, mask, density):
    layout = local_layout(grid, mask, density, 3, 2)
    share = attended(layout)
    if grid[1] * grid[2] * density > 9:
        assert abs(share / density - 1) < 0.35
    if len(layout.order.inverse) < 5000:
        image = layout.token_mask(torch.device("cpu"))[layout.image, layout.image]
        assert share == pytest.approx(image.double().mean().item())


def test_text_is_attended_both_ways():
    layout = local_layout((1, 8, 8), "band", 0.1, before=4, after=2)
    mask = layout.token_mask(torch.device("cpu"))
    for text in (slice(0, 4), slice(68, 70)):
        assert mask[text].all()
        assert mask[:, text].all()
    assert mask[4:68, 4:68].float().mean() < 0.2


def test_published_sizes():
    """4,096 tokens of a picture and 13 x 30 x 45 of a video at 3.1 %."""
    picture, video = local_layout((1, 64, 64), "band", 0.031), local_layout((13, 30, 45), "frames", 0.031, 226)
    assert (picture.order.length, picture.neighbours.shape[1]) == (42, 3)
    assert (video.order.group, video.neighbours.shape[1]) == ((13, 1, 15), 3)  # 45 of 1,350 places a frame
    assert not video.order.is_padded


def test_large_pictures_take_whole_tiles():
    layout = local_layout((1, 128, 128), "band", 0.031)
    assert layout.order.length == 128
    assert not layout.order.is_padded
