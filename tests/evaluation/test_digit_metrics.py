import pytest
import torch

from smalti.data.digits import load_digits
from smalti.evaluation import digit_metrics
from smalti.evaluation.digit_metrics import class_spread, digit_report, load_classifier


@pytest.fixture
def classifier(digits, monkeypatch):
    """Trained for a moment on digits that a font wrote."""
    monkeypatch.setattr(digit_metrics, "EPOCHS", 100)
    load_classifier.cache_clear()
    yield load_classifier()
    load_classifier.cache_clear()


def test_it_is_trained_once(classifier, digits):
    (kept,) = (digits / "prepared").glob("digit-classifier*")
    before = kept.stat().st_mtime_ns
    load_classifier.cache_clear()
    again = load_classifier()
    assert kept.stat().st_mtime_ns == before
    for mine, theirs in zip(again.parameters(), classifier.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_report_tells_good_drawings_from_bad_ones(classifier):
    real = load_digits("held-out").pixels()
    best = digit_report(real)
    assert best.distance == pytest.approx(0, abs=1e-3)
    assert best.accuracy > 0.8
    assert digit_report((real + torch.randn(real.shape)).clamp(-1, 1)).distance > 1
    some = torch.arange(0, len(real), 2)
    assert digit_report(real[some], some) == pytest.approx((0, best.accuracy), abs=0.2)
    swapped = digit_report(real.flip(0))
    assert swapped.accuracy < 0.3
    assert swapped.distance == pytest.approx(0, abs=1e-3)  # the same digits, asked for as others


def test_the_spread_of_a_class_tells_variety(classifier):
    held_out = load_digits("held-out")
    real, labels = held_out.pixels(), held_out.labels
    means = torch.stack([real[labels == one].mean(0) for one in range(10)])
    assert class_spread(means[labels], labels) == pytest.approx(0, abs=1e-6)
    assert 0 < class_spread((real + means[labels]) / 2, labels) < class_spread(real, labels)
