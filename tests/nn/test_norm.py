"""The RMS norm equals PyTorch's and keeps the dtype."""

import torch

from smalti.nn.norm import RMSNorm


def test_equals_torch():
    ours, theirs = RMSNorm(9, eps=1e-3), torch.nn.RMSNorm(9, eps=1e-3)
    torch.nn.init.normal_(ours.weight)
    theirs.weight = ours.weight
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours(x.bfloat16()).dtype == torch.bfloat16
