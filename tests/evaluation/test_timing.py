import time

import pytest

from smalti.core.errors import UserError
from smalti.evaluation.timing import bootstrap_interval, median_seconds, paired_ratio


def test_median_counts_no_warmup():
    calls = []
    assert median_seconds(lambda: calls.append(time.sleep(0.002)), repeats=5, warmup=3) >= 0.002
    assert len(calls) == 8


def test_ratio_of_a_slower_callable():
    ratio = paired_ratio(lambda: time.sleep(0.02), lambda: time.sleep(0.005), repeats=5, warmup=1)
    assert 1.5 < ratio.low <= ratio.median <= ratio.high
    assert not ratio.reaches_one
    assert ratio.first > ratio.second


def test_interval_holds_the_median_and_narrows():
    values = [float(v % 7) for v in range(70)]
    low, high = bootstrap_interval(values)
    assert low <= 3.0 <= high
    wide = bootstrap_interval(values[:7])
    assert high - low < wide[1] - wide[0]


def test_refuses():
    with pytest.raises(UserError, match="at least 1"):
        median_seconds(lambda: None, repeats=0)
