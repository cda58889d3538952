"""The inverse square root rises over its warm-up, then falls; LambdaLR takes it as it is."""

import doctest

import pytest
import torch

from smalti.core.errors import UserError
from smalti.training import rates
from smalti.training.rates import inverse_sqrt


def test_in_a_torch_scheduler():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, inverse_sqrt(8))
    seen = []
    for _ in range(128):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert seen[:8] == pytest.approx([2 * step / 8 for step in range(1, 9)])
    assert max(seen) == seen[7] == 2.0
    assert seen[31] == pytest.approx(1.0)
    assert seen[127] == pytest.approx(0.5)


def test_refuses_and_examples():
    with pytest.raises(UserError, match="warmup is 0"):
        inverse_sqrt(0)
    assert doctest.testmod(rates).failed == 0
