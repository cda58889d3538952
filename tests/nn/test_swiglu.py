"""The gated layer: its formula, and two thirds of the hidden width, rounded up."""

import torch
from torch.nn import functional as F

from smalti.nn.swiglu import SwiGLU


def test_is_the_formula():
    layer, x = SwiGLU(6, 2.0, multiple=4), torch.randn(2, 3, 6)
    gate, value = layer.proj_in.weight.chunk(2)
    torch.testing.assert_close(layer(x), (F.silu(x @ gate.T) * (x @ value.T)) @ layer.proj_out.weight.T)
    assert layer.proj_in.bias is None
    assert layer.proj_out.bias is None


def test_hidden_width():
    widths = [SwiGLU(1024, ratio).proj_out.in_features for ratio in (0.5, 3.0, 4.0)]
    assert widths == [512, 2048, 2816]
