"""Which tokens are image and which are text, at every attention and block, read by watching a model run.

Three short passes: the plain inputs, another sample, another text. In each only the first block of a stack runs, and
attention gives zeros, so nothing mixes tokens: a row that moved with the sample is image, one that moved with the text
alone is text, one that never moved is a register. No model is known by name, and no order of streams is assumed.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.protocols import Segment, TokenLayout
from smalti.seams.anatomy import Anatomy, Block, Sublayer
from smalti.seams.frame import Attention, Forward, Frame, entered, inside

TEXT_NAMES = re.compile("encoder_hidden|text|caption|cap_feats|prompt")


@dataclass(frozen=True)
class BlockStreams:
    """Where a block takes its streams and gives them back.

    Args:
        inputs: stream by position (int) or name (str) of the argument.
        outputs: stream of each output, None for one that is no stream.
        is_tuple: whether the block returns a tuple.
    """

    inputs: Mapping[int | str, str]
    outputs: tuple[str | None, ...]
    is_tuple: bool


@dataclass(frozen=True)
class Layouts:
    """What was read for one shape of inputs.

    Args:
        queries: segments of the queries of every attention that was seen in a first block, by stack and name.
        keys: segments of its keys.
        streams: of the blocks, by stack.
    """

    queries: Mapping[tuple[str, str], TokenLayout]
    keys: Mapping[tuple[str, str], TokenLayout]
    streams: Mapping[str, BlockStreams]


@dataclass
class _Seen:
    """What one pass saw, by stack (and attention)."""

    queries: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    keys: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    inputs: dict[str, dict[int | str, Tensor]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


class _Watch(Frame):
    """Runs the first block of every stack with attention that gives zeros, and passes its outputs through the rest."""

    def __init__(self, model: nn.Module):
        self.model, self.seen = model, _Seen()

    def at_block(self, block: Block, forward: Forward, args: tuple, kwargs: dict) -> Any:
        stack = block.site.stack
        if stack not in self.seen.outputs:
            arguments: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
            self.seen.inputs[stack] = {name: one.detach().clone() for name, one in arguments.items() if _is_stream(one)}
            self.seen.outputs[stack] = forward(*args, **kwargs)
        return self.seen.outputs[stack]

    def at_sublayer(self, sublayer: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        with inside(self, sublayer if sublayer.site.kind == "attention" else None):
            return forward(*args, **kwargs)

    def at_feeder(self, sublayer: Sublayer, feeder: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        return self.at_sublayer(feeder, forward, args, kwargs)

    def at_core(self, sublayer: Sublayer, attention: Attention) -> Tensor:
        key = (sublayer.site.stack, sublayer.site.name)
        self.seen.queries.setdefault(key, attention.q)
        self.seen.keys.setdefault(key, attention.k)
        return attention.v.new_zeros((*attention.q.shape[:-1], attention.v.shape[-1]))


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
        runs = [(kind, len(list(rows))) for kind, rows in groupby(kinds(pick))]
        grids = [grid_of(length, anatomy, arguments) if kind == "image" else None for kind, length in runs]
        return TokenLayout(tuple(Segment(kind, n, grid) for (kind, n), grid in zip(runs, grids, strict=True)))

    return Layouts(
        queries={key: layout(lambda seen, key=key: seen.queries[key]) for key in plain.queries},
        keys={key: layout(lambda seen, key=key: seen.keys[key]) for key in plain.keys},
        streams={stack: _streams(stack, plain, kinds) for stack in plain.outputs},
    )


def grid_of(length: int, anatomy: Anatomy, arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The (frames, height, width) of so many image tokens, from the shape of the sample, position ids or sizes that the
    call gives; None if none of them has that product."""
    sample = arguments[anatomy.sample]
    candidates = [*_grids_of_sample(length, sample, anatomy.model), *_grids_of_arguments(arguments, length)]
    return next((grid for grid in candidates if math.prod(grid) == length), None)


def _grids_of_sample(length: int, sample: Any, model: nn.Module) -> list[tuple[int, int, int]]:
    if isinstance(sample, (list, tuple)):
        sample = sample[0] if sample and isinstance(sample[0], Tensor) else None
        sample = sample if sample is None or sample.ndim != 4 else sample[None]
    if not isinstance(sample, Tensor) or sample.ndim not in (4, 5):
        return []
    height, width = sample.shape[-2:]
    if sample.ndim == 4:
        frames = [1]
    else:
        channels = getattr(getattr(model, "config", None), "in_channels", None)
        is_frames_first = sample.shape[1] != channels and sample.shape[2] == channels
        frames = [sample.shape[1 if is_frames_first else 2], 1]
    grids = []
    for count in frames:
        for temporal in (1, 2, 4):
            patch = math.sqrt(count // temporal * height * width / length)
            if count % temporal == 0 and patch == int(patch) >= 1 and not height % patch and not width % patch:
                grids.append((count // temporal, height // int(patch), width // int(patch)))
    return grids


def _grids_of_arguments(arguments: Mapping[str, Any], length: int) -> list[tuple[int, int, int]]:
    grids = []
    for name, value in arguments.items():
        if name.endswith("ids") and isinstance(value, Tensor) and value.ndim >= 2 and value.shape[-2] == length:
            counts = [len(axis.unique()) for axis in value.reshape(-1, length, value.shape[-1])[0].unbind(-1)]
            sizes = ([1, 1, 1] + [count for count in counts if count > 1])[-3:]
            grids.append(tuple(sizes))
        elif name == "img_shapes":
            grids += [tuple(shape) for shape in _leaves(value)]
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if all(isinstance(size, int) for size in sizes[1:]):
        grids.append((sizes[0] if isinstance(sizes[0], int) else 1, *sizes[1:]))
    return grids  # type: ignore[return-value]


def _leaves(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, int) for one in value):
        return [tuple(value)]
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, (list, tuple)) else []


def _streams(stack: str, plain: _Seen, kinds: Callable[[Callable[[_Seen], Any]], list[str]]) -> BlockStreams:
    def stream(pick: Callable[[_Seen], Any]) -> str | None:
        found = {kind for kind in kinds(pick) if kind != "register"}
        return "joint" if len(found) == 2 else found.pop() if found else None

    inputs = {name: stream(lambda seen, name=name: seen.inputs[stack][name]) for name in plain.inputs[stack]}
    given = plain.outputs[stack]
    outputs = tuple(
        stream(lambda seen, index=index: _as_tuple(seen.outputs[stack])[index]) if _is_stream(one) else None
        for index, one in enumerate(_as_tuple(given))
    )
    kept = {name: one for name, one in inputs.items() if one is not None and one in outputs}
    return BlockStreams(kept, outputs, isinstance(given, tuple))


def _changed(arguments: Mapping[str, Any], what: Callable[[str], bool], change: Callable) -> dict[str, Any]:
    """The arguments with every floating-point tensor of the chosen names changed, in lists and dataclasses too."""

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value) if value.is_floating_point() else value
        return type(value)(visit(one) for one in value) if type(value) in (list, tuple) else value

    result = {}
    for name, value in arguments.items():
        if what(name):
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
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
