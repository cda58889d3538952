import pytest
import torch
from PIL import Image

from smalti.core.errors import UserError
from smalti.data.buckets import aspect_buckets, batches, fit, nearest_bucket


@pytest.mark.parametrize(("size", "multiple"), [(64, 4), (64, 16), (128, 16), (256, 32), (512, 16)])
def test_buckets_are_multiples_of_about_equal_area(size, multiple):
    buckets = aspect_buckets(size, multiple)
    assert (size, size) in buckets
    assert len(buckets) == len(set(buckets)) >= 5
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert max(height, width) <= 2 * min(height, width)
        assert abs(height * width / size**2 - 1) <= 0.125
        assert (width, height) in buckets


@pytest.mark.parametrize(
    ("size", "multiple", "message"),
    [(32, 8, "from 64 to 512"), (1024, 8, "from 64 to 512"), (100, 16, "the nearest that is: 96"), (64, 0, "multiple")],
)
def test_sizes_that_do_not_fit_are_refused(size, multiple, message):
    with pytest.raises(UserError, match=message):
        aspect_buckets(size, multiple)


def test_pictures_go_to_the_nearest_aspect():
    buckets = aspect_buckets(64, 16)
    assert nearest_bucket(100, 100, buckets) == (64, 64)
    assert nearest_bucket(300, 500, buckets) == (48, 80)
    assert nearest_bucket(4000, 10, buckets) == (96, 48)


def test_fitting_cuts_alike_at_both_sides():
    picture = Image.new("RGB", (90, 30))
    for left, colour in ((0, "red"), (30, "lime"), (60, "blue")):
        picture.paste(colour, (left, 0, left + 30, 30))
    fitted = fit(picture, (30, 50))
    assert fitted.size == (50, 30)
    assert [fitted.getpixel((x, 15)) for x in (2, 25, 47)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert fit(picture.rotate(90, expand=True), (60, 60)).getpixel((30, 30)) == (0, 255, 0)


GROUPS = [(64, 64)] * 21 + [(48, 80)] * 10 + [(80, 48)]


def test_batches_hold_one_group_and_every_sample_once():
    found = batches(GROUPS, 4, seed=1)
    assert sorted(i for batch in found for i in batch) == list(range(32))
    assert all(len({GROUPS[i] for i in batch}) == 1 and len(batch) <= 4 for batch in found)


def test_batches_repeat_with_seed_and_epoch_and_change_with_them():
    torch.manual_seed(5)  # the global generator has no say
    again = batches(GROUPS, 4, seed=1)
    torch.manual_seed(6)
    assert batches(GROUPS, 4, seed=1) == again
    assert batches(GROUPS, 4, seed=2) != again
    assert batches(GROUPS, 4, seed=1, epoch=1) != again


def test_incomplete_batches_can_be_dropped():
    assert [len(batch) for batch in batches(GROUPS, 4, seed=1, drop_last=True)] == [4] * 7
    with pytest.raises(UserError, match="choose 1 or more"):
        batches(GROUPS, 0, seed=1)
