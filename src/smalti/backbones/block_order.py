"""The order of a block: which sublayers it has, in which order, and how much each of them adds.

A list of `(sublayer, factor)`: "attn" is self-attention, "cross" attention to a memory, "ffn" the feed-forward layer;
"attn+ffn" is two that run side by side from one norm, under one gate. All feed-forward layers of a block share its
hidden width equally, so an order with two has as many parameters in them as one with one. Where more norms or a larger
adaLN (3 D^2 an entry) break the balance, `equal_ffn_ratio` restores it.

Source: factors and halves, arXiv 1906.02762 (Macaron Net); side by side, arXiv 2302.05442, section 2.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from smalti.core.errors import UserError, unknown_name

Order = Sequence[tuple[str, float]]
M = TypeVar("M", bound=nn.Module)
KINDS = ("attn", "cross", "ffn")
ORDERS: dict[str, Order] = {
    "standard": (("attn", 1.0), ("ffn", 1.0)),
    "lie-trotter": (("attn", 1.0), ("ffn", 1.0)),  # the standard order by the name of its splitting
    "macaron": (("ffn", 0.5), ("attn", 1.0), ("ffn", 0.5)),
    "reversed": (("ffn", 1.0), ("attn", 1.0)),
    "parallel": (("attn+ffn", 1.0),),
}


class Entry(NamedTuple):
    """One entry of an order: the names that its sublayers have in the block, and its factor."""

    names: tuple[str, ...]
    factor: float


def read_order(order: str | Order) -> tuple[tuple[str, float], ...]:
    """An order by name, or as a list, checked.

    Raises:
        UserError: an unknown name or sublayer, an empty list, or a factor that is 0 or not finite.
    """
    if isinstance(order, str):
        if order not in ORDERS:
            raise unknown_name("block order", order, ORDERS)
        order = ORDERS[order]
    found = tuple((sublayers, float(factor)) for sublayers, factor in order)
    if not found:
        raise UserError("a block order without entries does nothing; give at least one, such as ('ffn', 1.0)")
    for sublayers, factor in found:
        for kind in sublayers.split("+"):
            if kind not in KINDS:
                raise unknown_name("sublayer", kind, KINDS)
        if not math.isfinite(factor) or factor == 0:
            raise UserError(f"the factor of {sublayers} is {factor}; give a finite number other than 0")
    return found


def entries_of(order: str | Order) -> tuple[Entry, ...]:
    """The order with names for its sublayers: the kind alone, or, where it comes more than once, ffn_a, ffn_b, ..."""
    listed = [(sublayers.split("+"), factor) for sublayers, factor in read_order(order)]
    total, seen = Counter(kind for kinds, _ in listed for kind in kinds), Counter()
    entries = []
    for kinds, factor in listed:
        names = []
        for kind in kinds:
            names.append(kind if total[kind] == 1 else f"{kind}_{chr(ord('a') + seen[kind])}")
            seen[kind] += 1
        entries.append(Entry(tuple(names), factor))
    return tuple(entries)


def names_of(order: str | Order) -> tuple[str, ...]:
    """The names of all sublayers, in their order."""
    return tuple(name for entry in entries_of(order) for name in entry.names)


def kind_of(name: str) -> str:
    """The kind of a sublayer: "ffn" of "ffn_a"."""
    return name.partition("_")[0]


def count_ffn(order: str | Order) -> int:
    """How many feed-forward layers an order has; they share the hidden width, at least 1."""
    return max(1, sum(kind_of(name) == "ffn" for name in names_of(order)))


def with_cross(order: str | Order) -> Order:
    """The order of a decoder: cross-attention stands behind self-attention (macaron: ffn, attn, cross, ffn)."""
    found: list[tuple[str, float]] = []
    for sublayers, factor in read_order(order):
        found.append((sublayers, factor))
        if "attn" in sublayers.split("+"):
            found.append(("cross", 1.0))
    return tuple(found)


def count_parameters(module: nn.Module) -> int:
    """Numbers that a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())


def equal_ffn_ratio(target: int, build: Callable[[float], nn.Module], width: int, order: str | Order) -> float:
    """The `ffn_ratio` with which a module has as many parameters as another, to within half a neuron of each layer.

    Three norms in place of two, or 9 D^2 of adaLN in place of 6 D^2, are so paid for by the feed-forward layers.

    Args:
        target: the number of parameters to meet.
        build: makes the module from an ffn_ratio, a block or a whole model; called without memory for its weights.
        width: D.
        order: of its blocks.

    Raises:
        UserError: no width is small enough.

    """
    neuron = count_ffn(order) / width  # the ratio of one hidden neuron in each layer
    with torch.device("meta"):
        one, two = (count_parameters(build((number + 0.5) * neuron)) for number in (1, 2))
    number = 1 + round((target - one) / (two - one))
    if number < 1:
        raise UserError(f"even one hidden neuron takes {one} parameters, more than {target}; use a shared modulation")
    return (number + 0.5) * neuron  # half a neuron more, so that no rounding error takes one away


def build_equal(build: Callable[[float, str | Order], M], width: int, order: str | Order, ffn_ratio: float = 4.0) -> M:
    """A module in an order, with as many parameters as the standard one (see `equal_ffn_ratio`).

    Args:
        build: makes the module from ffn_ratio and order.
        width: D.
        order: of its blocks.
        ffn_ratio: of the standard one.
    """
    if read_order(order) == read_order("standard"):
        return build(ffn_ratio, order)
    with torch.device("meta"):
        target = count_parameters(build(ffn_ratio, "standard"))
    return build(equal_ffn_ratio(target, lambda ratio: build(ratio, order), width, order), order)
