"""Taps: the image tokens after chosen blocks of any transformer, with their gradient, while it runs as it always does.

Which of a block's outputs holds the image, and where in a joint sequence it stands, is read from the model (see
`seams.layout`) once for each shape of inputs; after that a tap is a hook that cuts a slice.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.errors import Refusal, UserError
from smalti.seams.anatomy import read_anatomy
from smalti.seams.attach import attached
from smalti.seams.layout import Layouts, read_layouts, shapes_of

Grid = tuple[int, int, int]


@dataclass
class Taken:
    """What the last call of the model left.

    Args:
        tokens: image tokens (B, N, D) after a block, by its depth, the first block being 1.
        grid: (frames, height, width) of the image tokens, or None if it could not be read.
    """

    tokens: dict[int, Tensor] = field(default_factory=dict)
    grid: Grid | None = None


class Taps:
    """Taps on blocks of a model, there until `remove()`.

    Args:
        model: the transformer.
        depths: which blocks, counted from 1 over all stacks in the order in which they stand.

    Raises:
        Refusal: the model cannot be read.
        UserError: a depth that it does not have.

    Example:
        >>> taps = Taps(model, [4])
        >>> velocity = model(x, t, cond)
        >>> taps.taken.tokens[4].shape
        torch.Size([2, 64, 192])
    """

    def __init__(self, model: nn.Module, depths: Sequence[int]):
        self.anatomy = read_anatomy(model)
        blocks = self.anatomy.blocks
        for depth in depths:
            if not 1 <= depth <= len(blocks):
                raise UserError(f"got a tap after block {depth}; {type(model).__name__} has blocks 1 to {len(blocks)}")
        self.model, self.taken = model, Taken()
        self._signature = inspect.signature(model.forward)
        self._known: dict[Any, Layouts] = {}
        self._layouts: Layouts | None = None  # None while they are read
        begin: Any = torch.compiler.disable(self._begin)  # a compiled model leaves its graph for the hooks
        self._hooks = [model.register_forward_pre_hook(begin, with_kwargs=True)]
        for depth in dict.fromkeys(depths):
            block = blocks[depth - 1]
            take: Any = torch.compiler.disable(partial(self._take, depth, block.site.stack))
            self._hooks.append(block.module.register_forward_hook(take))

    def remove(self) -> None:
        """Takes the hooks off."""
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Reads the layouts of these inputs, if they are not known yet."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        key = shapes_of({name: value for name, value in arguments.items() if name != self.anatomy.time})
        self._layouts = None
        if key not in self._known:
            self._known[key] = self._read(arguments)
        self.taken, self._layouts = Taken(), self._known[key]

    def _read(self, arguments: dict[str, Any]) -> Layouts:
        with attached(self.anatomy):
            return read_layouts(self.anatomy, self.model.forward, arguments)

    def _take(self, depth: int, stack: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self._layouts is None:
            return
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        streams = dict(zip(self._layouts.streams[stack].outputs, outputs, strict=True))
        seen = [layout for (place, _), layout in self._layouts.queries.items() if place == stack]
        if streams.get("image") is not None:
            self.taken.tokens[depth] = streams["image"]
        else:
            joint = streams.get("joint")
            found = [one for one in seen if joint is not None and len(one) == joint.shape[1]]
            if joint is None or not found:
                raise Refusal(f"no image tokens can be told after block {depth} of {type(self.model).__name__}")
            self.taken.tokens[depth] = joint[:, found[0].span("image")]
        grids = (one.grid for layout in seen for one in layout.segments if one.kind == "image" and one.grid)
        self.taken.grid = next(grids, None)
