"""What a frozen layer is given for each of several tasks: a scale, a shift and a small branch with a ReLU.

`y = (1 + a) * (W x) + b_hat + b + s * W_up relu(W_down x)` for a layer `W x + b_hat`, with a and b one number an output
channel. a and b reweight what the layer can do already, the branch adds what it cannot. a, b and W_up start at 0, so a
new task computes what the layer does, bit for bit. The scale acts on W x alone, never on the layer's own bias.

Everything is computed from the layer's output, `W x = output - b_hat`, so it may be quantised. The numbers of K tasks
lie in one tensor each, whose rows are picked by an index: one task for the whole batch, or one for each sample.

Source: Diffscaler (arXiv 2404.09976), section 3. Letters: K tasks, r rank, I inputs, O output channels.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.errors import Refusal

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
LAYERS = (nn.Linear, *CONVS, *NORMS, nn.Embedding)
"""What can be adapted; only linear layers and convolutions can have a branch."""


class Form(NamedTuple):
    """Which parts a layer is given.

    Args:
        scale: a, one number a channel, or one for the whole layer (scalar); none leaves it out.
        shift: b.
        rank: r of the branch; 0 leaves it out.
        relu: between W_down and W_up; without it the branch is LoRA's.
        strength: s, a number to start at where it is learned; none keeps it at 1.
    """

    scale: Literal["channel", "scalar"] | None = "channel"
    shift: bool = True
    rank: int = 0
    relu: bool = True
    strength: float | None = 1.0


class Affiner(nn.Module):
    """The parameters of K tasks for one layer, and what they make of its output.

    Args:
        layer: a member of `LAYERS` with a weight.
        form: which parts it gets; norms and embeddings never get a branch.
        tasks: K.

    Raises:
        Refusal: the layer is of another kind, or a convolution pads with something else than zeros.
    """

    def __init__(self, layer: nn.Module, form: Form, tasks: int = 1):
        super().__init__()
        channels = channels_of(layer)
        self.axis = 1 if isinstance(layer, (*CONVS, nn.GroupNorm)) else -1
        self.relu = form.relu
        self.scale = _zeros(tasks, 1 if form.scale == "scalar" else channels) if form.scale else None
        self.shift = _zeros(tasks, channels) if form.shift else None
        self.down = self.up = self.strength = None
        self.conv = None
        if form.rank and isinstance(layer, (nn.Linear, *CONVS)):
            if isinstance(layer, CONVS):
                self.conv = _conv_settings(layer)
                inner = (layer.in_channels, *layer.kernel_size)
            else:
                inner = (layer.in_features,)
            bound = math.prod(inner) ** -0.5
            self.down = nn.Parameter(torch.empty(tasks, form.rank, *inner).uniform_(-bound, bound))
            self.up = _zeros(tasks, channels, form.rank)
            self.strength = None if form.strength is None else nn.Parameter(torch.full((tasks,), form.strength))

    def forward(
        self, x: Tensor, out: Tensor, bias: Tensor | None, index: Tensor, merged: tuple[bool, bool] = (False, False)
    ) -> Tensor:
        """The output of the layer for the tasks of an index.

        Args:
            x: input of the layer (B, ..., I), of a convolution (B, I, ...).
            out: its output.
            bias: its own b_hat (O,), or None.
            index: the task of the batch, of no dimension, or of each sample (B,).
            merged: whether scale and shift stand in the layer's weights already.

        Raises:
            Refusal: samples have tasks of their own, but the layer's rows are not the batch's.
        """
        if index.ndim and out.shape[0] != index.shape[0]:
            raise Refusal(
                f"a layer sees {out.shape[0]} rows where {index.shape[0]} samples have tasks of their own; give the "
                "whole batch one task"
            )
        scale = None if merged[0] else self._row(self.scale, index, out.dtype)
        shift = None if merged[1] else self._row(self.shift, index, out.dtype)
        branch = None if self.down is None else self._branch(x, index)
        if scale is not None:
            if bias is not None:  # (1 + a)(out - b_hat) + b_hat = (1 + a) out - a b_hat
                from_bias = -scale * bias.to(out.dtype)
                shift = from_bias if shift is None else shift + from_bias
            scale = self._spread(1 + scale, out)
            out = scale * out if shift is None else torch.addcmul(self._spread(shift, out), scale, out)
        elif shift is not None:
            out = out + self._spread(shift, out)
        return out if branch is None else out + branch

    def _branch(self, x: Tensor, index: Tensor) -> Tensor:
        down, up = self._row(self.down, index, x.dtype), self._row(self.up, index, x.dtype)
        assert down is not None
        assert up is not None
        if self.strength is not None:
            up = up * self._row(self.strength, index, x.dtype)[..., None, None]  # type: ignore[index]
        if self.conv is not None:
            return self._conv_branch(x, down, up)
        if down.ndim == 2:  # one task
            return F.linear(self._activate(F.linear(x, down)), up)
        flat = x.reshape(len(x), -1, x.shape[-1])  # (B, N, I)
        made = self._activate(flat @ down.mT) @ up.mT  # (B, N, O)
        return made.reshape(*x.shape[:-1], up.shape[-2])

    def _conv_branch(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        assert self.conv is not None
        conv = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
        ones = (1,) * (x.ndim - 2)
        if down.ndim == x.ndim:  # (r, I, ...): one task
            hidden = self._activate(conv(x, down, **self.conv))
            return conv(hidden, up.reshape(*up.shape, *ones))
        batch, rank = down.shape[:2]  # each sample is a group of one large sample
        grouped = x.reshape(1, -1, *x.shape[2:])
        hidden = self._activate(conv(grouped, down.flatten(0, 1), **self.conv, groups=batch))
        made = conv(hidden, up.reshape(-1, rank, *ones), groups=batch)
        return made.reshape(batch, -1, *made.shape[2:])

    def _activate(self, hidden: Tensor) -> Tensor:
        return F.relu(hidden) if self.relu else hidden

    def _row(self, table: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor | None:
        return None if table is None else rows_of(table, index).to(dtype)

    def _spread(self, rows: Tensor, out: Tensor) -> Tensor:
        """Numbers of the channels (O,) or (B, O), shaped to meet the output."""
        batch = rows.shape[:-1]
        if self.axis == 1:
            return rows.reshape(*(batch or (1,)), -1, *(1,) * (out.ndim - 2))
        return rows.reshape(*batch, *(1,) * (out.ndim - 2), -1) if batch else rows


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table (K, ...): (...) for one task, (B, ...) for one a sample; with K = 1 always (...)."""
    if len(table) == 1:
        return table[0]
    # `table[index]` with an index of no dimension would be compiled anew for each of its values.
    rows = table.index_select(0, index.reshape(-1))
    return rows if index.ndim else rows[0]


def channels_of(layer: nn.Module) -> int:
    """O of a layer.

    Raises:
        Refusal: it is no member of `LAYERS`, or has no weight.
    """
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, CONVS):
        return layer.out_channels
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    if isinstance(layer, NORMS) and layer.weight is not None and layer.weight.ndim == 1:
        return layer.weight.shape[0]
    raise Refusal(
        f"{type(layer).__name__} cannot be adapted; linear layers, convolutions, embeddings and norms with one weight "
        "a channel can"
    )


def has_channels(layer: nn.Module) -> bool:
    """Whether a layer is one of `LAYERS` with a weight."""
    return isinstance(layer, LAYERS) and getattr(layer, "weight", None) is not None


@torch.no_grad()
def merged_weights(
    layer: Any, scale: Tensor | None, shift: Tensor | None
) -> tuple[dict[str, Tensor], tuple[bool, bool]]:
    """The weights of a layer with scale and shift of one task inside.

    Args:
        layer: in floating point, with at most a bias.
        scale: a (O,) or (1,), or None.
        shift: b (O,), or None.

    Returns:
        New values by the name of the parameter, and whether scale and shift are inside: a layer without bias cannot
        take a shift, only an embedding can.

    Raises:
        Refusal: its weight is quantised.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        raise Refusal(f"the weight of {type(layer).__name__} is quantised; leave the task unmerged")
    if isinstance(layer, nn.Embedding):  # its rows are outputs
        made = weight.float() * (1 if scale is None else 1 + scale) + (0 if shift is None else shift)
        return {"weight": made}, (scale is not None, shift is not None)
    values: dict[str, Tensor] = {}
    if scale is not None:
        values["weight"] = weight.float() * (1 + scale).reshape(-1, *(1,) * (weight.ndim - 1))
    if shift is not None and bias is not None:
        values["bias"] = bias.float() + shift
    return values, ("weight" in values, "bias" in values)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def _conv_settings(layer: nn.Module) -> dict:
    assert isinstance(layer, CONVS)
    if layer.padding_mode != "zeros":
        raise Refusal(f"a convolution that pads with {layer.padding_mode} cannot have a branch; leave it out")
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
