import pytest
import torch
from torch import nn

from smalti.core.errors import UserError
from smalti.nn.patchify import patchify
from smalti.nn.widen import widen


@pytest.mark.parametrize("bias", [True, False])
def test_new_inputs_change_nothing_at_first_and_learn_at_once(bias):
    layer = nn.Linear(4 * 4, 6, bias=bias)
    x, given = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 4, 4)
    wide = widen(layer, 3 * 4)
    found = wide(patchify(torch.cat([x, given], 1), 2))
    torch.testing.assert_close(found, layer(patchify(x, 2)), rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    assert wide.weight.grad[:, 16:].abs().min() > 0
    assert layer.weight.grad is None


def test_convolutions_too():
    layer = nn.Conv2d(2, 5, 3, stride=2, padding=1)
    x, given = torch.randn(1, 2, 6, 6), torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(widen(layer, 4)(torch.cat([x, given], 1)), layer(x), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_widened_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        widen(nn.Linear(2, 2), 0)
    with pytest.raises(UserError, match="2 groups"):
        widen(nn.Conv2d(2, 2, 1, groups=2), 1)
