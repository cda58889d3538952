"""The parts of a transformer that can be switched off one by one: heads, hidden neurons, modulation channels.

Nothing is known by name of a model; units are read from its `Anatomy` (heads h, head_dim d, hidden width m):

- `heads`: a head's output is d columns of the input of the projection that closes the attention. Joint attention has
  one such projection a stream, and a head is one unit in all of them. Where attention has none of its own (FLUX.1's
  single blocks) the closing projection of the block reads [attention, feed-forward], attention first.
- `ffn`: a hidden neuron is one column of the input of the last linear layer of a feed-forward layer, behind its
  activation; gated layers (GEGLU, SwiGLU) make it from two rows, side by side in one layer or in two layers.
- `mod`: a channel of shift, scale or gate is one row of a block's modulation (adaLN) layer.

`masked` multiplies units while a model runs: inputs of the reading layers before them, outputs of modulation after it.

Source: EcoDiff (arXiv 2412.02852), section 3; pruning of whole heads (arXiv 1905.10650).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.errors import NeverEngaged, Refusal, UserError, unknown_name
from smalti.seams.anatomy import NOT_FFN, OUT_PROJECTIONS, Block, Sublayer, is_linear, read_anatomy

KINDS = ("heads", "ffn", "mod")
HEAD_COUNTS = ("heads", "num_heads", "n_heads", "num_attention_heads")
ADDED_OUT_PROJECTIONS = ("to_add_out", "add_out_proj")
FUSED = {"to_qkv": 3, "to_kv": 2, "to_added_qkv": 3}
"""Projections to queries, keys and values side by side: how many, each (h, d)."""


@dataclass(frozen=True)
class Place:
    """Where units stand in a linear layer: unit u is `size` columns (or rows) from start + u * size, at every start.

    Args:
        path: of the layer in the model.
        starts: one, or several where a unit is made of parts that stand apart.
    """

    path: str
    starts: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class UnitGroup:
    """The units of one layer.

    Args:
        name: path of the layer in the model.
        kind: heads, ffn or mod.
        count: number of units.
        size: columns of a unit: d of a head, else 1.
        readers: layers whose inputs the units are.
        writers: layers whose outputs the units are made of.
        counter: path of the module and name of its attribute that holds the number of heads; "" if there is none.
        fault: why these units can be masked and not cut out; "" if they can.
    """

    name: str
    kind: str
    count: int
    size: int
    readers: tuple[Place, ...]
    writers: tuple[Place, ...]
    counter: tuple[str, str] = ("", "")
    fault: str = ""

    def parameters(self, model: nn.Module) -> int:
        """Weights and biases that belong to one unit."""
        made = [(_layer(model, place), len(place.starts)) for place in self.writers]
        written = sum((_fan_in(layer) + (getattr(layer, "bias", None) is not None)) * times for layer, times in made)
        read = sum(_layer(model, place).out_features for place in self.readers)
        return self.size * (written + read)


def read_units(model: nn.Module, kinds: Sequence[str] = KINDS, select: str = "") -> tuple[UnitGroup, ...]:
    """The units of a transformer, in the order of its blocks.

    Args:
        model: ours, diffusers', or one built alike.
        kinds: of units, see the module.
        select: a regular expression that the names of groups must contain, such as "single_blocks"; "" = all.

    Raises:
        Refusal: the model has no units of a kind, or they cannot be told apart.
        UserError: an unknown kind, or nothing is selected.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of units", kind, KINDS)
    anatomy, readers = read_anatomy(model), {"heads": _heads, "ffn": _ffn, "mod": _modulation}
    found: list[UnitGroup] = []
    for block in anatomy.blocks:
        for kind in kinds:
            found += readers[kind](block)
    name = type(model).__name__
    for kind in kinds:
        if not any(group.kind == kind for group in found):
            raise Refusal(f"{name} has no units of kind {kind}: {_ABSENT[kind]}; leave {kind} out")
    chosen = tuple(group for group in found if re.search(select, group.name))
    if not chosen:
        raise UserError(f"no group of units of {name} matches {select!r}; names look like {found[0].name}")
    return chosen


_ABSENT = {
    "heads": "no attention whose closing projection and number of heads can be told",
    "ffn": "no feed-forward layer that closes with a linear layer (convolutions have no neurons of one token)",
    "mod": "its blocks hold no linear layer that makes shift, scale and gate (one for all blocks serves them)",
}


@contextmanager
def masked(model: nn.Module, groups: Iterable[UnitGroup], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, units are multiplied by masks (count,), looked up by group at every call; gradients flow to them.

    Args:
        model: whose units they are; hooks are put on its layers and taken off at the end.
        groups: of its units.
        masks: by the name of the group; may change inside.

    Raises:
        NeverEngaged: the model ran, but some layer was not called as a module.
    """
    groups, reached, hooks = tuple(groups), set(), []
    for group in groups:
        for place in group.readers or group.writers:
            hooks.append(_hook(model, group, place, masks, reached))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    missed = [group.name for group in groups if group.name not in reached]
    if reached and missed:
        raise NeverEngaged(f"{missed[0]} of {type(model).__name__} ran past its mask; leave it out by `select`")


def _hook(model: nn.Module, group: UnitGroup, place: Place, masks: Mapping[str, Tensor], reached: set[str]) -> Any:
    layer, start = _layer(model, place), place.starts[0]
    width = layer.in_features if group.readers else layer.out_features

    def factors(like: Tensor) -> Tensor:
        reached.add(group.name)
        mask = masks[group.name].to(like).repeat_interleave(group.size)
        return F.pad(mask, (start, width - start - len(mask)), value=1.0)

    def before(module: nn.Module, args: tuple) -> tuple:
        return (args[0] * factors(args[0]), *args[1:])

    def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * factors(output)

    return layer.register_forward_pre_hook(before) if group.readers else layer.register_forward_hook(after)


def _heads(block: Block) -> Iterator[UnitGroup]:
    closing = {feeder.module: one for one in block.sublayers if one.site.kind == "fused" for feeder in one.feeders}
    for attention in block.attentions:
        path = f"{block.site}.{attention.site.name}"
        parts = {path: attention.module, **_companions(block, attention)}
        out = {f"{where}.{name}": one for where, part in parts.items() for name, one in _out_projections(part)}
        counter = _counter(block, attention)
        if out:
            inner = next(iter(out.values())).in_features
        elif attention.module in closing and is_linear(closing[attention.module].module):
            inner, out = _inner(attention.module), {str(closing[attention.module].site): None}
        if not out or counter is None or inner % counter.value:
            continue
        writers, fault = _projections(parts, inner, counter.value)
        if not writers:  # what the closing projection reads is not attention alone (FLUX.2's single blocks)
            continue
        size, readers = inner // counter.value, tuple(Place(one) for one in out)
        yield UnitGroup(path, "heads", counter.value, size, readers, writers, (counter.path, counter.name), fault)


def _companions(block: Block, attention: Sublayer) -> dict[str, nn.Module]:
    """Modules beside an attention that only hold its weights for another stream, by path."""
    return {
        f"{block.site}.{name}": child
        for name, child in block.module.named_children()
        if name.startswith(f"{attention.site.name}_") and type(child).forward is nn.Module.forward
    }


def _out_projections(attention: nn.Module) -> Iterator[tuple[str, Any]]:
    for name in (*OUT_PROJECTIONS, *ADDED_OUT_PROJECTIONS):
        child = getattr(attention, name, None)
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) and is_linear(child[0]):
            yield f"{name}.0", child[0]
        elif isinstance(child, nn.Module) and is_linear(child):
            yield name, child


class _Counter(NamedTuple):
    """Where the number of heads is kept: in the attention, or in its block."""

    path: str
    name: str
    value: int


def _counter(block: Block, attention: Sublayer) -> _Counter | None:
    for path, owner in ((f"{block.site}.{attention.site.name}", attention.module), (str(block.site), block.module)):
        for name in HEAD_COUNTS:
            if isinstance(getattr(owner, name, None), int):
                return _Counter(path, name, getattr(owner, name))
    return None


def _inner(attention: nn.Module) -> int:
    """Width of an attention without a projection of its own: that of its queries."""
    return next(layer.out_features for _, layer in _linears(attention))


def _projections(parts: Mapping[str, nn.Module], inner: int, heads: int) -> tuple[tuple[Place, ...], str]:
    """The layers that make queries, keys and values, and why heads cannot be cut out of them ("" if they can)."""
    places, fault, is_told = [], "", False
    for where, part in parts.items():
        closing = [layer for _, layer in _out_projections(part)]
        layers = [(name, layer) for name, layer in _linears(part) if all(layer is not one for one in closing)]
        for name, layer in layers:
            times = FUSED.get(name, 1)
            if layer.out_features != times * inner:
                fault = f"{where}.{name} gives {layer.out_features} numbers where each of {heads} heads would own some"
            places.append(Place(f"{where}.{name}", tuple(inner * index for index in range(times))))
            is_told |= layer.out_features % inner == 0
        for name, child in part.named_modules():
            own = [one for one in child.parameters(recurse=False) if one.ndim == 1]
            if not is_linear(child) and heads > 1 and any(one.numel() == inner for one in own):
                fault = f"{where}.{name} is a norm over all heads together, so every head changes the others"
    return tuple(places) if is_told else (), fault


def _ffn(block: Block) -> Iterator[UnitGroup]:
    for one in block.sublayers:
        if one.site.kind == "fused" and is_linear(one.module):
            yield from _fused_neurons(one)
            continue
        for part in (one, *one.feeders) if one.site.kind == "fused" else (one,):
            if part.site.kind == "ffn":
                yield from _neurons(part)


def _neurons(part: Sublayer) -> Iterator[UnitGroup]:
    """Neurons of a feed-forward module, or of linear layers of the block itself of which one closes the others."""
    if is_linear(part.module):
        layers: dict[str, Any] = {str(one.site): one.module for one in (part, *part.feeders) if is_linear(one.module)}
    else:
        layers = {f"{part.site}.{name}": layer for name, layer in _linears(part.module)}
    for path, closing in reversed(layers.items()):
        others = {where: layer for where, layer in layers.items() if layer is not closing}
        starts = {where: _starts(layer, closing.in_features) for where, layer in others.items()}
        reads_width = all(layer.in_features == closing.out_features for layer in others.values())
        if others and reads_width and all(starts.values()):
            writers = tuple(Place(where, some) for where, some in starts.items())
            yield UnitGroup(str(part.site), "ffn", closing.in_features, 1, (Place(path),), writers)
            return


def _fused_neurons(closing: Sublayer) -> Iterator[UnitGroup]:
    """Neurons that a closing projection reads behind the attention of the same block."""
    attention = next(one for one in closing.feeders if one.site.kind == "attention")
    start = _inner(attention.module)
    hidden = _fan_in(closing.module) - start
    for feeder in closing.feeders:
        starts = _starts(feeder.module, hidden)
        if feeder.site.kind == "ffn" and starts:
            readers, writers = (Place(str(closing.site), (start,)),), (Place(str(feeder.site), starts),)
            yield UnitGroup(str(feeder.site), "ffn", hidden, 1, readers, writers)


def _starts(layer: Any, hidden: int) -> tuple[int, ...]:
    """Where a layer's outputs make hidden neurons, once, or twice with their gates; () if they do not."""
    if not is_linear(layer):
        return ()
    return {hidden: (0,), 2 * hidden: (0, hidden)}.get(layer.out_features, ())


def _modulation(block: Block) -> Iterator[UnitGroup]:
    for name, child in block.module.named_children():
        is_list = isinstance(child, nn.ModuleList)
        if is_linear(child) or is_list or not NOT_FFN.search(type(child).__name__):
            continue
        for path, layer in _linears(child):
            if "emb" not in path and layer.out_features >= 2 * layer.in_features:
                where = f"{block.site}.{name}.{path}"
                yield UnitGroup(where, "mod", layer.out_features, 1, (), (Place(where),))


def _linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All linear layers by path; one with an adapter is one layer."""
    for name, child in module.named_children():
        if is_linear(child):
            yield prefix + name, child
        else:
            yield from _linears(child, f"{prefix}{name}.")


def _layer(model: nn.Module, place: Place) -> Any:
    return model.get_submodule(place.path)


def _fan_in(layer: Any) -> int:
    return layer.in_features
