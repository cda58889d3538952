"""A trained projection that takes further inputs: new columns of zeros, so that at first nothing changes.

    y = [W 0] [x; c] + b

The gradient of the new columns is not zero, so they learn from the first step. Tokens are flattened channel by channel
(`patchify`), so the columns of channels that are appended to a picture are the last ones.

Source: the usual start of models that take a condition beside their input, such as InstructPix2Pix (arXiv 2211.09800),
section 3.2; the conditional models of LFM (arXiv 2307.08698) have such inputs.
"""

from typing import TypeVar

import torch
from torch import nn

from smalti.core.errors import UserError

Projection = TypeVar("Projection", nn.Linear, nn.Conv2d)


@torch.no_grad()
def widen(layer: Projection, inputs: int) -> Projection:
    """A copy with further inputs behind the old ones.

    Args:
        layer: Linear (out, in) or Conv2d (out, in, h, w) with one group.
        inputs: how many are added, at least 1; for a Linear of patches the added channels times P^2.

    Raises:
        UserError: nothing is added, or the layer has groups.
    """
    if inputs < 1:
        raise UserError(f"got {inputs} further inputs; add at least 1")
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise UserError(f"a convolution of {layer.groups} groups cannot take further inputs; one group can")
        wide = nn.Conv2d(
            layer.in_channels + inputs, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
            layer.dilation, bias=layer.bias is not None, padding_mode=layer.padding_mode,  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        wide = nn.Linear(layer.in_features + inputs, layer.out_features, bias=layer.bias is not None)
    wide = wide.to(layer.weight.device, layer.weight.dtype)
    nn.init.zeros_(wide.weight)
    wide.weight[:, : layer.weight.shape[1]] = layer.weight
    if layer.bias is not None:
        assert wide.bias is not None
        wide.bias.copy_(layer.bias)
    return wide.train(layer.training)  # type: ignore[return-value]
