"""A layout of all groups equals plain attention, one of few does not; both ways are timed in turn."""

import torch

from smalti.acceleration.grat import region_layout
from smalti.evaluation.sparse_attention import largest_error, sparse_ratio


def test_errors():
    assert largest_error(region_layout((1, 8, 8), (1, 2, 2), "all", 3)) < 1e-5
    assert largest_error(region_layout((1, 8, 8), (1, 2, 2), "block:0", 3)) > 0.01


def test_a_thin_layout_is_faster_than_a_wide_one():
    thin, wide = (region_layout((1, 32, 32), (1, 8, 8), region) for region in ("block:0", "cross"))
    cpu = torch.device("cpu")
    assert sparse_ratio(thin, cpu).median > sparse_ratio(wide, cpu).median
