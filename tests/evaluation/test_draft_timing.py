"""Both ways are timed in turn; the projection follows from FLOPs."""

import pytest
import torch

from smalti.evaluation.draft_timing import DraftTimes, crossover, draft_times, largest_error, whole_gain
from smalti.evaluation.timing import Ratio
from smalti.ops.token_order import group_order

CPU = torch.device("cpu")


def test_fewer_blocks_are_faster_and_the_way_is_right():
    order = group_order((1, 32, 32), (1, 8, 8))
    thin, wide = (draft_times(order, sparsity, CPU, repeats=5) for sparsity in (0.9, 0.2))
    assert thin.backend == wide.backend == "gather"
    assert thin.ratio.median > wide.ratio.median
    assert thin.overhead < 1
    assert largest_error(group_order((2, 9, 8), (1, 4, 4)), 0.5, CPU) < 1e-5


def test_what_a_whole_model_gains():
    order = group_order((33, 48, 80), (1, 8, 16))
    assert whole_gain(order, 3072, 1.0) == pytest.approx(1)
    assert whole_gain(order, 3072, 3.0) == pytest.approx(1.77, abs=0.01)  # what the paper's 1.75 takes
    assert whole_gain(order, 3072, 1e9, dense=0.0) == pytest.approx(1 + 126_720 / (6 * 3072))


def test_the_crossover_is_the_largest_length_that_is_not_faster():
    def times(low):
        return DraftTimes(Ratio(low + 0.1, low, low + 0.2, 1.0, 1.0, 5), 0.1, "gather")

    assert crossover({1024: times(0.7), 2048: times(0.95), 4096: times(1.4)}) == "2,048 tokens"
    assert crossover({1024: times(1.2), 2048: times(1.4)}) == "faster from 1,024 tokens on"
