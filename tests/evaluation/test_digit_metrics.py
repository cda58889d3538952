import pytest
import torch

from smalti.data.digits import load_digits
from smalti.evaluation import digit_metrics
from smalti.evaluation.digit_metrics import digit_report, load_classifier


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
    swapped = digit_report(real.flip(0))
    assert swapped.accuracy < 0.3
    assert swapped.distance == pytest.approx(0, abs=1e-3)  # the same digits, asked for as others
