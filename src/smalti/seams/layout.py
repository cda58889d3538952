"""Which tokens are image and which are text, at every attention and block, read by watching a model run.

Three short passes: the plain inputs, another sample, another text. In each only the first block of a stack runs (and
later ones with attention that it lacks), and attention gives every query itself, so nothing mixes tokens: a row that
moved with the sample is image, one that moved with the text alone is text, one that never moved is a register. No model
is known by name, and no order of streams is assumed.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.method import Site
from smalti.core.protocols import Segment, TokenLayout
from smalti.seams.anatomy import Anatomy, Block, Sublayer
from smalti.seams.frame import Attention, Forward, Frame, entered, inside
from smalti.seams.grid import grid_of

TEXT_NAMES = re.compile("encoder_hidden|encodings|(?<!con)text|caption|cap_feats|prompt|input_ids")


@dataclass(frozen=True)
class BlockStreams:
    """Where a block takes its streams and gives them back.

    Args:
        inputs: stream by position (int) or name (str) of the argument.
        outputs: stream of each output, None for one that is no stream.
        is_tuple: whether the block returns a tuple.
        memory: arguments that hold text but do not come back.
        rows: segments of every stream, by its argument.
        fault: why no method can act on these streams; empty if one can.
    """

    inputs: Mapping[int | str, str]
    outputs: tuple[str | None, ...]
    is_tuple: bool
    fault: str = ""
    memory: frozenset[int | str] = frozenset()
    rows: Mapping[int | str, TokenLayout] = field(default_factory=dict)


@dataclass(frozen=True)
class Layouts:
    """What was read for one shape of inputs.

    Args:
        queries: segments of the queries of every attention that was seen, by stack and name; a second call within the
            same attention has the name of the attention and "#1" (see `core_name`).
        keys: segments of its keys.
        streams: of the blocks, by stack.
        proven: kinds of blocks that were found to compute the same when only some of their tokens run.
    """

    queries: Mapping[tuple[str, str], TokenLayout]
    keys: Mapping[tuple[str, str], TokenLayout]
    streams: Mapping[str, BlockStreams]
    proven: set[Any] = field(default_factory=set)


@dataclass
class _Seen:
    """What one pass saw, by stack (and attention)."""

    queries: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    keys: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    inputs: dict[str, dict[int | str, Tensor]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


class _Watch(Frame):
    """Runs the first block of every stack with attention that mixes nothing; its outputs go through the rest."""

    def __init__(self, model: nn.Module):
        self.model, self.seen = model, _Seen()
        self.known: dict[str, set[str]] = {}
        self.calls: Counter[Site] = Counter()

    def at_block(self, block: Block, forward: Forward, args: tuple, kwargs: dict) -> Any:
        stack, names = block.site.stack, {one.site.name for one in block.attentions}
        if stack not in self.known:
            arguments: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
            self.seen.inputs[stack] = {name: one.detach().clone() for name, one in arguments.items() if _is_stream(one)}
            self.seen.outputs[stack] = forward(*args, **kwargs)
        elif not names <= self.known[stack]:
            forward(*args, **kwargs)
        self.known.setdefault(stack, set()).update(names)
        return self.seen.outputs[stack]

    def at_sublayer(self, sublayer: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        with inside(self, sublayer if sublayer.site.kind == "attention" else None):
            return forward(*args, **kwargs)

    def at_feeder(self, sublayer: Sublayer, feeder: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        return self.at_sublayer(feeder, forward, args, kwargs)

    def at_core(self, sublayer: Sublayer, attention: Attention) -> Tensor:
        key = (sublayer.site.stack, core_name(sublayer.site.name, self.calls[sublayer.site]))
        self.calls[sublayer.site] += 1
        self.seen.queries.setdefault(key, attention.q)
        self.seen.keys.setdefault(key, attention.k)
        width = attention.v.shape[-1]
        is_alike = attention.q.shape[-1] == width
        return attention.q if is_alike else attention.q.new_zeros((*attention.q.shape[:-1], width))


def core_name(name: str, call: int) -> str:
    """Name of one call of the attention function within the attention of this name; some call it in pieces."""
    return f"{name}#{call}" if call else name


@torch.no_grad()
def read_layouts(anatomy: Anatomy, forward: Forward, arguments: Mapping[str, Any]) -> Layouts:
    """Watches a model at the inputs of a call; attention must be switched.

    Args:
        anatomy: of the model.
        forward: the model's own forward.
        arguments: of the call, by name.
    """

    def watch(change: Callable[[Tensor], Tensor] | None, what: Callable[[str], bool]) -> _Seen:
        frame = _Watch(anatomy.model)
        changed = dict(arguments) if change is None else _changed(arguments, what, change)
        with entered(frame):
            forward(**changed)
        return frame.seen

    def noisy(tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        return tensor + (1 + tensor.std()) * noise

    plain = watch(None, lambda name: False)
    other_image = watch(noisy, lambda name: name == anatomy.sample)
    other_text = watch(noisy, lambda name: TEXT_NAMES.search(name) is not None)

    def kinds(pick: Callable[[_Seen], Any]) -> list[str]:
        base, by_image, by_text = (pick(seen) for seen in (plain, other_image, other_text))
        moved_image, moved_text = _moved(base, by_image), _moved(base, by_text)
        return ["image" if i else "text" if t else "register" for i, t in zip(moved_image, moved_text, strict=True)]

    def layout(pick: Callable[[_Seen], Tensor]) -> TokenLayout:
        rows = kinds(pick)
        segments, start = [], 0
        for kind, run in groupby(rows):
            length = len(list(run))
            grid = grid_of(length, start, len(rows), anatomy, arguments) if kind == "image" else None
            segments.append(Segment(kind, length, grid))  # type: ignore[arg-type]
            start += length
        return TokenLayout(tuple(segments))

    return Layouts(
        queries={key: layout(lambda seen, key=key: seen.queries[key]) for key in plain.queries},
        keys={key: layout(lambda seen, key=key: seen.keys[key]) for key in plain.keys},
        streams={stack: _streams(stack, plain, kinds, layout) for stack in plain.outputs},
    )


def shapes_of(value: Any) -> Any:
    """What of a call's arguments decides where its tokens stand: shapes of tensors and whole numbers."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(shapes_of(one) for one in value)
    if isinstance(value, Mapping):
        return tuple((name, shapes_of(one)) for name, one in value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return shapes_of({one.name: getattr(value, one.name) for one in fields(value)})
    return value if isinstance(value, (int, str)) else None


def _streams(
    stack: str,
    plain: _Seen,
    kinds: Callable[[Callable[[_Seen], Any]], list[str]],
    layout: Callable[[Callable[[_Seen], Tensor]], TokenLayout],
) -> BlockStreams:
    """Streams are those inputs that come back: of the same kind and shape as an output."""

    def stream(pick: Callable[[_Seen], Any]) -> str:
        found = set(kinds(pick)) - {"register"}
        return "joint" if len(found) == 2 else found.pop() if found else "register"

    given = plain.outputs[stack]
    outputs = tuple(
        stream(lambda seen, index=index: _as_tuple(seen.outputs[stack])[index]) if _is_stream(one) else None
        for index, one in enumerate(_as_tuple(given))
    )
    back = {(kind, one.shape) for kind, one in zip(outputs, _as_tuple(given), strict=True) if kind is not None}
    given_kinds = {name: stream(lambda seen, name=name: seen.inputs[stack][name]) for name in plain.inputs[stack]}
    kept = {name: kind for name, kind in given_kinds.items() if (kind, plain.inputs[stack][name].shape) in back}
    memory = frozenset(name for name, kind in given_kinds.items() if kind == "text" and name not in kept)
    rows = {name: layout(lambda seen, name=name: seen.inputs[stack][name]) for name in kept}
    outputs = tuple(kind if kind in kept.values() else None for kind in outputs)
    return BlockStreams(kept, outputs, isinstance(given, tuple), _fault(stack, kept, outputs, plain), memory, rows)


def _fault(stack: str, kept: Mapping[int | str, str], outputs: tuple[str | None, ...], plain: _Seen) -> str:
    """Why a method cannot act on the streams of a block."""
    for kinds in (list(kept.values()), [kind for kind in outputs if kind is not None]):
        if not kinds or len(set(kinds)) < len(kinds):
            return f"cannot be told apart: {kinds}"
    lengths = {q.shape[-2] for (place, _), q in plain.queries.items() if place == stack}
    for name in kept:
        shape = plain.inputs[stack][name].shape
        if len(shape) == 3 and shape[0] in lengths and shape[1] not in lengths:
            return f"stand along the first axis of {tuple(shape)} instead of the second"
    return ""


def _changed(arguments: Mapping[str, Any], what: Callable[[str], bool], change: Callable) -> dict[str, Any]:
    """The arguments with every floating-point tensor of the chosen names changed, in lists and dataclasses too; ids of
    words change places."""

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value) if value.is_floating_point() else value
        return type(value)(visit(one) for one in value) if type(value) in (list, tuple) else value

    result = {}
    for name, value in arguments.items():
        if what(name) and name.endswith("input_ids") and isinstance(value, Tensor):
            result[name] = value.roll(1, -1)
        elif what(name):
            result[name] = visit(value)
        elif is_dataclass(value) and not isinstance(value, type):
            inner = {one.name: visit(getattr(value, one.name)) for one in fields(value) if what(one.name)}
            result[name] = replace(value, **inner)
        else:
            result[name] = value
    return result


def _moved(one: Tensor, other: Tensor) -> list[bool]:
    """Which tokens differ, for tensors (..., L, D)."""
    rows = one.ndim - 2
    return (one != other).movedim(rows, 0).flatten(1).any(1).tolist()


def _is_stream(value: Any) -> bool:
    """Whether a value may hold tokens: (B, L, D), or (L, D) where clips are packed into one sequence."""
    return isinstance(value, Tensor) and value.ndim in (2, 3) and value.is_floating_point()


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
