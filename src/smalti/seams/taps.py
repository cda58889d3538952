"""Taps: the image tokens after chosen blocks of any transformer, with their gradient, while it runs as it always does.

Which of a block's outputs holds the image, and where in a joint sequence it stands, is read from the model (see
`seams.layout`) once for each shape of inputs; after that a tap is a hook that cuts a slice. Beside tokens, the queries
and keys of image tokens can be had: their products are what the softmax sees, those with text left out.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.errors import Refusal, UserError
from smalti.ops.attention_maps import attention_logits
from smalti.seams.anatomy import Block, read_anatomy
from smalti.seams.attach import attached
from smalti.seams.attention_watch import AttentionWatch
from smalti.seams.image_attention import image_grid
from smalti.seams.layout import Layouts, core_name, read_layouts, shapes_of

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class ImageAttention:
    """Queries and keys of image tokens (B, h, N, d) as the softmax takes them, and the factor on their products."""

    q: Tensor
    k: Tensor
    scale: float | None

    def logits(self) -> Tensor:
        """Their scaled products (B, h, N, N), float32; computed when asked, so that one block's exist at a time."""
        return attention_logits(self.q, self.k, self.scale)


@dataclass
class Taken:
    """What the last call of the model left.

    Args:
        tokens: image tokens (B, N, D) after a block, by its depth, the first block being 1.
        grid: (frames, height, width) of the image tokens, or None if it could not be read.
        attention: of image tokens among themselves inside a block, by its depth.
    """

    tokens: dict[int, Tensor] = field(default_factory=dict)
    grid: Grid | None = None
    attention: dict[int, ImageAttention] = field(default_factory=dict)


class Taps:
    """Taps on blocks of a model, there until `remove()`.

    Args:
        model: the transformer.
        depths: after which blocks, counted from 1 over all stacks in the order in which they stand.
        attentions: inside which blocks queries and keys are taken.

    Raises:
        Refusal: the model cannot be read; at a call, a block has no one attention among image tokens.
        UserError: a depth that it does not have.

    Example:
        >>> taps = Taps(model, [4])
        >>> velocity = model(x, t, cond)
        >>> taps.taken.tokens[4].shape
        torch.Size([2, 64, 192])
    """

    def __init__(self, model: nn.Module, depths: Sequence[int], attentions: Sequence[int] = ()):
        self.anatomy = read_anatomy(model)
        blocks = self.anatomy.blocks
        for depth in (*depths, *attentions):
            if not 1 <= depth <= len(blocks):
                raise UserError(f"got a tap at block {depth}; {type(model).__name__} has blocks 1 to {len(blocks)}")
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
        self._inside = {depth: blocks[depth - 1] for depth in attentions}
        self._watch: AttentionWatch | None = None
        if self._inside:
            sublayers = [one for block in self._inside.values() for one in block.attentions]
            self._watch = AttentionWatch(model, sublayers)
            finish: Any = torch.compiler.disable(self._finish)
            self._hooks.append(model.register_forward_hook(finish, always_call=True))

    def remove(self) -> None:
        """Takes the hooks off."""
        if self._watch is not None:
            self._watch.remove()
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
        if self._watch is not None:
            self._watch.begin()

    def _finish(self, module: nn.Module, args: tuple, output: Any) -> None:
        assert self._watch is not None
        self._watch.end()
        if output is not None:  # it is where the model raised
            for depth, block in self._inside.items():
                self.taken.attention[depth] = self._image_attention(block)

    def _image_attention(self, block: Block) -> ImageAttention:
        """The first attention of a block whose queries and keys are image tokens, if it is one call of the function."""
        assert self._watch is not None
        assert self._layouts is not None
        found: list[ImageAttention] = []
        for one in block.attentions:
            for number, call in enumerate(self._watch.calls.get(one.site, ())):
                key = (block.site.stack, core_name(one.site.name, number))
                queries, keys = self._layouts.queries[key], self._layouts.keys[key]
                grid = image_grid(queries, keys)
                if grid is not None:
                    self.taken.grid, span = grid, queries.span("image")
                    found.append(ImageAttention(call.q[:, :, span], call.k[:, :, span], call.scale))
            if found:
                break
        if len(found) != 1:
            raise Refusal(
                f"{block.site} in {type(self.model).__name__} has {len(found)} calls of scaled_dot_product_attention "
                "among image tokens on a known grid where one is needed; its attention has no logits to compare"
            )
        return found[0]

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
