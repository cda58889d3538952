"""Sweeps find the best rate of each width and what taking another's costs."""

import math

import pytest

from smalti.core.errors import UserError
from smalti.training.rate_sweep import sweep, transferred_share

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def bowl(width, rate, seed):
    """The wider, the smaller the best rate."""
    best = 4e-3 if width == 32 else 1e-3
    return 1.0 + 0.1 * abs(math.log2(rate / best)) + 0.001 * seed


def test_best_rates_and_the_cost_of_taking_them():
    found = sweep(bowl, (32, 128), RATES, seeds=(0, 1))
    assert (found.best(32), found.best(128)) == (4e-3, 1e-3)
    assert found.is_inside(32)
    assert not found.is_inside(128)
    assert found.transfer_cost(32, 128) == pytest.approx([1.2 / 1.0 - 1, 1.201 / 1.001 - 1])
    assert found.transfer_cost(32, 32) == [0.0, 0.0]
    table = found.table().splitlines()
    assert len(table) == 3
    assert table[1].count("*") == table[2].count("*") == 1


def test_what_diverges_is_never_the_best():
    found = sweep(lambda width, rate, seed: math.nan if rate > 2e-3 else 1.0 + rate, (32,), RATES)
    assert found.best(32) == 1e-3
    assert math.isinf(found.mean(32, 8e-3))


def test_an_empty_sweep_is_refused_and_costs_add_up():
    with pytest.raises(UserError, match="at least one"):
        sweep(bowl, (), RATES)
    assert transferred_share(1.0, 20, 400.0) == pytest.approx(0.05)
