"""Shapes of a model whose layers have lost rows and columns, as a small entry of its configuration.

The entry maps paths to what differs from a whole model: `{"in": n, "out": n}` of a linear layer, `{"scattered": n}` of
one that makes only n of its outputs (the others are 0), `{"heads": n}` of a module that counts its attention heads. So
blocks may have unequal numbers of heads and neurons, and `from_pretrained` builds them before it reads the weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError

Shapes = Mapping[str, Mapping[str, int]]


class ScatteredLinear(nn.Module):
    """A linear layer that makes some of its outputs and leaves the others at 0: (..., in) -> (..., out).

    Args:
        in_features: of the input.
        out_features: of the output.
        kept: number of outputs that are made; `index` (kept,) says which.
        bias: whether they have a bias.
    """

    index: Tensor

    def __init__(self, in_features: int, out_features: int, kept: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(kept, in_features))
        self.bias = nn.Parameter(torch.zeros(kept)) if bias else None
        self.register_buffer("index", torch.arange(kept))

    def forward(self, x: Tensor) -> Tensor:
        made = nn.functional.linear(x, self.weight, self.bias)
        return made.new_zeros(*made.shape[:-1], self.out_features).index_copy(-1, self.index, made)


def reshape(model: nn.Module, shapes: Shapes) -> None:
    """Gives a new model the layers and head counts of a pruned one; the weights are still to be loaded.

    Raises:
        UserError: an entry names no such layer.
    """
    for path, shape in shapes.items():
        try:
            layer = model.get_submodule(path)
        except AttributeError as error:
            raise UserError(f"pruned names {path!r}, which {type(model).__name__} does not have") from error
        if "heads" in shape:
            vars(layer)["heads"] = shape["heads"]
        elif not isinstance(layer, nn.Linear):
            raise UserError(f"pruned gives {path!r} the shape {dict(shape)}; it is no linear layer but {layer}")
        elif "scattered" in shape:
            has_bias = layer.bias is not None
            replaced = ScatteredLinear(layer.in_features, layer.out_features, shape["scattered"], has_bias)
            model.set_submodule(path, replaced)
        else:
            into, out = shape.get("in", layer.in_features), shape.get("out", layer.out_features)
            model.set_submodule(path, nn.Linear(into, out, bias=layer.bias is not None))
