import pytest
import torch

from smalti.core.errors import UserError
from smalti.data.digit_maps import MAP_CLASSES, digit_maps, maps_of
from smalti.data.digits import load_digits
from smalti.evaluation import digit_segmenter
from smalti.evaluation.digit_segmenter import load_segmenter, segment_digits
from smalti.evaluation.segmentation import map_report, mean_iou


def test_intersection_over_union_by_hand():
    given = torch.tensor([[[0, 0, 1, 1]]])
    found = torch.tensor([[[0, 1, 1, 1]]])
    assert mean_iou(found, given, 3) == pytest.approx((1 / 2 + 2 / 3) / 2)  # class 2 is nowhere
    assert mean_iou(given, given, 3) == 1
    with pytest.raises(UserError, match="equal ones"):
        mean_iou(found[:, :, :2], given, 3)
    with pytest.raises(UserError, match="0 to 0"):
        mean_iou(found, given, 1)


def test_shuffled_maps_fit_worse():
    given = torch.randint(4, (20, 8, 8), generator=torch.Generator().manual_seed(0))
    report = map_report(lambda pixels: pixels[:, 0].long(), given[:, None].float(), given, 4)
    assert report.fitting == 1
    assert 0.08 < report.shuffled < 0.25


def test_maps_say_where_to_write_what():
    pixels = torch.full((2, 1, 32, 32), -1.0)
    pixels[:, :, 10:20, 15] = 1.0
    maps = maps_of(pixels, torch.tensor([0, 7]))
    assert maps.unique().tolist() == [0, 1, 8]
    assert (maps[1] == 8).sum() == 12 * 3  # one pixel wider on each side


def test_a_segmenter_learns_the_maps(digits, monkeypatch):
    monkeypatch.setattr(digit_segmenter, "EPOCHS", 150)
    load_segmenter.cache_clear()
    real = load_digits("held-out")
    report = map_report(segment_digits, real.pixels(), digit_maps(real), MAP_CLASSES)
    load_segmenter.cache_clear()
    assert report.fitting > 0.5
    assert report.fitting > 2 * report.shuffled
    assert list((digits / "prepared").glob("digit-segmenter*"))
