"""Macaron Net: half a feed-forward layer, attention, the other half; conversion into it, and its view as an ODE.

Tokens are particles, attention is their interaction and the feed-forward layer what each does on its own:
`dx/dt = interaction(x) + own(x)`. A block "attention, then feed-forward" is one Euler step of Lie-Trotter splitting,
whose local error is O(h^2); Strang-Marchuk splitting has O(h^3):

    x <- x + 1/2 FFN_a(x);   x <- x + Attn(x);   x <- x + 1/2 FFN_b(x)

The halves have weights of their own and half the hidden width each. The blocks are those of `block` with the order
"macaron"; here is what is Macaron's alone. Note that order 2 is the order of the splitting with exact sub-flows. A
network takes Euler steps in them, and then both orders are 1: `splitting_errors` shows either.

Source: arXiv 1906.02762. Letters: n = 2 N dimensions of the toy system with N tokens.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import ConfigMixin
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.backbones.block import JointBlock, Parts, TransformerBlock
from smalti.backbones.block_order import Order, names_of, read_order
from smalti.core.errors import Refusal, UserError
from smalti.nn.ffn import FeedForward
from smalti.nn.modulation import Modulation, ModulationTable

M = TypeVar("M", bound=nn.Module)
INTERACTION, OWN = "attn", "ffn"
"""Which sublayer stands for which part of the ODE."""
SHAPES: dict[str, dict[str, Any]] = {
    "iwslt": {"width": 512, "depth": 6, "heads": 4, "ffn_ratio": 2.0, "dropout": 0.3},
    "wmt-base": {"width": 512, "depth": 6, "heads": 8, "ffn_ratio": 4.0, "dropout": 0.1},
    "wmt-big": {"width": 1024, "depth": 6, "heads": 16, "ffn_ratio": 4.0, "dropout": 0.3},
    "bert-base": {"width": 768, "depth": 12, "heads": 12, "ffn_ratio": 4.0, "dropout": 0.1, "positions": "learned"},
    "small": {"width": 128, "depth": 6, "heads": 4, "ffn_ratio": 4.0},
}
"""The paper's shapes and a small one as arguments of `TextShape`; each half has `ffn_ratio * width / 2` neurons."""


def to_macaron(module: M) -> M:
    """A copy of a trained standard block, or of a model of such blocks, in Macaron's order: a start for fine-tuning.

    The neurons of the feed-forward layer are dealt out to two halves whose output weights are doubled, so that half
    their sum is the old layer. The first half moves in front of attention, where it sees other tokens: the result is
    near the old block, not equal to it. Norm and modulation of the old layer serve both halves.

    Raises:
        Refusal: there is no block with one feed-forward layer of an even hidden width, or it has norms behind its
            sublayers, where two halves are not one whole.
    """
    if isinstance(module, TransformerBlock | JointBlock):
        return _convert(module)  # type: ignore[return-value]
    model = copy.deepcopy(module)
    block = None
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, TransformerBlock | JointBlock):
                block = child
                setattr(parent, name, _convert(child))
    if block is None:
        raise Refusal(
            f"{type(module).__name__} has no TransformerBlock or JointBlock that could become a Macaron block"
        )
    shared = getattr(model, "shared_modulation", None)
    if isinstance(shared, Modulation):
        model.shared_modulation = _regrouped(shared, _places(block))  # type: ignore[assignment]
    if isinstance(model, ConfigMixin):
        is_bare = isinstance(block, TransformerBlock) and block.bare_cross  # then the text's width brings it in
        new = tuple(entry for entry in _macaron_of(read_order(block.order)) if not (is_bare and entry[0] == "cross"))
        name = "macaron" if new == read_order("macaron") else [list(entry) for entry in new]
        model.register_to_config(block_order=name)
    return model


def split_ffn(ffn: FeedForward) -> tuple[FeedForward, FeedForward]:
    """Two layers of half the hidden width with `(a(x) + b(x)) / 2 = ffn(x)`; even neurons go to a, odd ones to b.

    Raises:
        Refusal: the hidden width is odd.
    """
    hidden, width = ffn.proj_in.weight.shape
    if hidden % 2:
        raise Refusal(f"a feed-forward layer of {hidden} neurons has no halves; its hidden width must be even")
    halves = []
    for first in (0, 1):
        half = FeedForward(width, (hidden // 2 + 0.5) / width, ffn.proj_out.bias is not None).to(ffn.proj_in.weight)
        with torch.no_grad():
            half.proj_in.weight.copy_(ffn.proj_in.weight[first::2])
            half.proj_in.bias.copy_(ffn.proj_in.bias[first::2])
            half.proj_out.weight.copy_(2 * ffn.proj_out.weight[:, first::2])
            if ffn.proj_out.bias is not None:
                half.proj_out.bias.copy_(ffn.proj_out.bias)  # counted twice, halved: itself
        halves.append(half)
    return halves[0], halves[1]


class ReluFeedForward(nn.Module):
    """`W2 relu(W1 x)`: (..., D) -> (..., D).

    Args:
        width: D.
        ratio: hidden width over D.
    """

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.proj_in = nn.Linear(width, int(width * ratio))
        self.proj_out = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(F.relu(self.proj_in(x)))


def reference_parts(width: int, ffn_ratio: float = 4.0) -> Parts:
    """The `parts` of a Macaron block as the authors' BERT has them: ReLU in FFN_a, GELU in FFN_b.

    The paper does not call for it; by default both halves have the same activation.
    """
    return {"ffn_a": lambda: ReluFeedForward(width, ffn_ratio / 2)}


def refine(blocks: Sequence[nn.Module], times: int) -> list[TransformerBlock]:
    """Depth as time with a finer step: every block runs so many times with its factors divided by that number.

    Weights are shared with the given blocks.

    Raises:
        Refusal: something is no TransformerBlock, or its norms follow the sums: then it is no step of an ODE.
    """
    finer = []
    for block in blocks:
        if not isinstance(block, TransformerBlock) or block.norm == "post":
            raise Refusal("a finer step needs TransformerBlocks whose norms stand before the sublayers")
        one = copy.copy(block)
        one.set_order(tuple((sublayers, factor / times) for sublayers, factor in block.order))
        finer += [one] * times
    return finer


class ToySystem(NamedTuple):
    """`dx/dt = (interaction + own) x`, both (n, n) float64, and a start (n,): particles of two dimensions on a ring."""

    interaction: Tensor
    own: Tensor
    start: Tensor


def toy_system(tokens: int = 8) -> ToySystem:
    """Every particle drifts to the mean of its neighbours and turns at a speed of its own; these do not commute."""
    ring = torch.eye(tokens, dtype=torch.float64)
    averaging = (ring.roll(1, 0) + ring.roll(-1, 0)) / 2 - ring  # what attention does: a mean, less the token itself
    place = torch.arange(tokens, dtype=torch.float64)
    speeds = 1 + torch.cos(2 * torch.pi * place / tokens)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    start = torch.stack([torch.cos(place), torch.sin(3 * place)], dim=1).flatten()
    two = torch.eye(2, dtype=torch.float64)
    return ToySystem(torch.kron(averaging, two), torch.kron(torch.diag(speeds), turn), start)


def splitting_errors(
    order: str | Order, steps: Sequence[int], exact: bool, system: ToySystem | None = None, time: float = 1.0
) -> list[float]:
    """Relative error of a block order on the toy system, with so many blocks for the same time.

    Args:
        order: attn stands for the interaction, ffn for the particles' own motion; one sublayer an entry.
        steps: numbers of blocks.
        exact: sub-flows by matrix exponentials; False takes `x + factor * h * F(x)`, as a network does.
        system: the default one if None.
        time: up to which the system runs.
    """
    system = system or toy_system()
    parts = {INTERACTION: system.interaction, OWN: system.own}
    target = torch.linalg.matrix_exp(time * (system.interaction + system.own)) @ system.start
    errors = []
    for count in steps:
        block = torch.eye(len(target), dtype=torch.float64)
        for sublayer, factor in read_order(order):
            if sublayer not in parts:
                raise UserError(f"the toy system has attn and ffn one after the other, got {sublayer!r}")
            move = factor * time / count * parts[sublayer]
            block = (torch.linalg.matrix_exp(move) if exact else torch.eye(len(target)) + move) @ block
        end = torch.linalg.matrix_power(block, count) @ system.start
        errors.append(((end - target).norm() / target.norm()).item())
    return errors


def halving_ratio(order: str | Order, exact: bool, steps: int = 64) -> float:
    """The error at half as many blocks over that at `steps`: 2 to the power of the order of accuracy."""
    coarse, fine = splitting_errors(order, (steps // 2, steps), exact)
    return coarse / fine


def _convert(block: TransformerBlock | JointBlock) -> TransformerBlock | JointBlock:
    order = read_order(block.order)
    suffixes = ("", "_text") if isinstance(block, JointBlock) else ("",)
    found = {suffix: getattr(block, f"ffn{suffix}", None) for suffix in suffixes}
    layers = {suffix: layer for suffix, layer in found.items() if isinstance(layer, FeedForward)}
    if len(layers) < len(found) or not any(sublayers == "ffn" for sublayers, _ in order):
        raise Refusal("only a block with one FeedForward of its own entry can become a Macaron block")
    if isinstance(block, TransformerBlock) and block.norm_kind != "layer":
        raise Refusal("a block with RMS norms cannot become a Macaron block; train one in that order from the start")
    if isinstance(block, TransformerBlock) and block.norm != "pre":
        raise Refusal(f"a block with norms in {block.norm} cannot become a Macaron block: halves would be normed apart")
    new = copy.deepcopy(block)
    new.set_order(_macaron_of(order))
    places = _places(block)
    for suffix, layer in layers.items():
        delattr(new, f"ffn{suffix}")
        for name, half in zip(("ffn_a", "ffn_b"), split_ffn(layer)):
            new.add_module(name + suffix, half)
        name = f"modulation{suffix}"
        if getattr(new, name) is not None:
            setattr(new, name, _regrouped(getattr(new, name), places))
    for name in names_of(new.order):  # children stand in the order in which they run
        for suffix in suffixes:
            child = getattr(new, name + suffix)
            delattr(new, name + suffix)
            new.add_module(name + suffix, child)
    if isinstance(block, TransformerBlock) and block.modulation is None:
        del new.norms
        new.norms = nn.ModuleList(copy.deepcopy(block.norms[place]) for place in places)
    return new


def _macaron_of(order: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Half of the feed-forward entry before all others, half behind them."""
    factor = next(factor for sublayers, factor in order if sublayers == "ffn")
    others = tuple(entry for entry in order if entry[0] != "ffn")
    return (("ffn", factor / 2), *others, ("ffn", factor / 2))


def _places(block: TransformerBlock | JointBlock) -> list[int]:
    """For each entry of the new order that has a norm the place of its origin's norm in the old one."""
    ffn = next(index for index, (sublayers, _) in enumerate(block.order) if sublayers == "ffn")
    origins = [ffn, *(index for index in range(len(block.order)) if index != ffn), ffn]
    places = block.places if isinstance(block, TransformerBlock) else range(len(block.order))
    return [place for place in (places[origin] for origin in origins) if place is not None]


def _regrouped(modulation: Any, places: Sequence[int]) -> Modulation | ModulationTable:
    """The modulation of the new order: every entry has the triple of its origin."""

    def regroup(tensor: Tensor) -> Tensor:
        groups = tensor.detach().chunk(modulation.sublayers)
        return torch.cat([groups[place] for place in places])

    if isinstance(modulation, ModulationTable):
        table = ModulationTable(len(modulation.table) // (3 * modulation.sublayers), len(places)).to(modulation.table)
        table.load_state_dict({"table": regroup(modulation.table)})
        return table
    new = Modulation(modulation.linear.in_features, len(places)).to(modulation.linear.weight)
    new.load_state_dict({f"linear.{name}": regroup(one) for name, one in modulation.linear.named_parameters()})
    return new
