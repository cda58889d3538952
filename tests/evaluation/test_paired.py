import numpy as np
import pytest

from smalti.evaluation.paired import compare, interval_of_mean


def test_outcomes():
    rng = np.random.default_rng(0)
    theirs = 1 + 0.1 * rng.standard_normal(64)
    assert compare(0.5 * theirs, theirs, 0.7).outcome == "holds"
    assert compare(0.9 * theirs, theirs, 0.7).outcome == "fails"
    assert compare(theirs + rng.standard_normal(64) - 0.02, theirs).outcome in ("unresolved", "fails")
    assert compare(theirs * 1.2, theirs, 1.1, below=False).outcome == "holds"
    assert compare(theirs, theirs * 1.2, 1.1, below=False).outcome == "fails"


def test_three_pairs_have_students_interval():
    values = np.array([1.0, 2.0, 4.0])
    low, high = interval_of_mean(values)
    half = 4.303 * values.std(ddof=1) / 3**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert compare([1, 2, 4], [10, 10, 10]).outcome == "holds"
    assert compare([1, 2, 9.9], [3, 4, 10]).outcome == "unresolved"


def test_many_pairs_are_resampled():
    values = np.random.default_rng(1).standard_normal(400) + 1
    low, high = interval_of_mean(values)
    assert (low, high) == pytest.approx((values.mean() - 0.098, values.mean() + 0.098), abs=0.01)


@pytest.mark.parametrize(("ours", "theirs"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 2, float("nan")], [1, 2, 3])])
def test_what_cannot_be_compared_is_refused(ours, theirs):
    with pytest.raises(ValueError, match=r"pairs|finite"):
        compare(ours, theirs)
