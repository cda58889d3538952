"""The (frames, height, width) of a run of image tokens, from what the call of a model says about sizes.

Sources, in this order: the shape of the sample, shapes and position ids among the arguments, frames, height and width
as numbers. The first whose product is the number of tokens wins.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from smalti.seams.anatomy import Anatomy

Grid = tuple[int, int, int]
CHANNELS = re.compile("in_channels|in_dim|in_visual_dim|latent_channels?")
"""Names in a configuration of the number of channels of the sample."""


def grid_of(length: int, start: int, total: int, anatomy: Anatomy, arguments: Mapping[str, Any]) -> Grid | None:
    """The grid of a run of image tokens; None if nothing in the call has that product.

    Args:
        length: tokens of the run.
        start: its place in the sequence.
        total: tokens of the sequence.
        anatomy: of the model.
        arguments: of the call, by name.
    """
    candidates = [
        *_of_sample(length, arguments[anatomy.sample], anatomy.model),
        *_of_shapes(arguments),
        *_of_ids(length, start, total, arguments),
        *_of_sizes(arguments),
    ]
    return next((grid for grid in candidates if math.prod(grid) == length), None)


def _of_sample(length: int, sample: Any, model: nn.Module) -> list[Grid]:
    """Every way to cut the sample into square patches that give so many tokens."""
    if isinstance(sample, (list, tuple)):
        sample = sample[0] if sample and isinstance(sample[0], Tensor) else None
        sample = sample if sample is None or sample.ndim != 4 else sample[None]
    if not isinstance(sample, Tensor) or sample.ndim not in (4, 5):
        return []
    sizes = list(sample.shape[1:])
    del sizes[_channel_axis(sample, model) - 1]
    height, width = sizes[-2:]
    grids = []
    for count in dict.fromkeys([sizes[0] if sample.ndim == 5 else 1, 1]):
        for temporal in (1, 2, 4):
            patch = math.sqrt(count // temporal * height * width / length)
            if count % temporal == 0 and patch == int(patch) >= 1 and not height % patch and not width % patch:
                grids.append((count // temporal, height // int(patch), width // int(patch)))
    return grids


def _channel_axis(sample: Tensor, model: nn.Module) -> int:
    """Of a clip the axis as long as the configuration says, first of all 1: some models take frames before channels,
    some channels last."""
    if sample.ndim == 4:
        return 1
    settings = dict(getattr(model, "config", None) or {})
    channels = {value for name, value in settings.items() if CHANNELS.fullmatch(name)}
    return next((axis for axis in (1, 2, 4) if sample.shape[axis] in channels), 1)


def _of_shapes(arguments: Mapping[str, Any]) -> list[Grid]:
    """Triples of whole numbers in arguments such as `img_shapes`."""
    found = [leaf for name, value in arguments.items() if "shape" in name for leaf in _leaves(value)]
    return [(leaf[0], leaf[1], leaf[2]) for leaf in found if len(leaf) == 3]


def _of_ids(length: int, start: int, total: int, arguments: Mapping[str, Any]) -> list[Grid]:
    """How many places the ids of these tokens take along each axis, be they of the image or of the whole sequence."""
    grids = []
    for name, value in arguments.items():
        if not name.endswith("ids") or not isinstance(value, Tensor) or value.ndim < 2:
            continue
        rows = value.reshape(-1, *value.shape[-2:])[0]
        if len(rows) == total != length:
            rows = rows[start : start + length]
        if len(rows) == length:
            counts = [len(axis.unique()) for axis in rows.unbind(-1)]
            sizes = ([1, 1, 1] + [count for count in counts if count > 1])[-3:]
            grids.append((sizes[0], sizes[1], sizes[2]))
    return grids


def _of_sizes(arguments: Mapping[str, Any]) -> list[Grid]:
    frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    if not isinstance(height, int) or not isinstance(width, int):
        return []
    return [(frames if isinstance(frames, int) else 1, height, width)]


def _leaves(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, int) for one in value):
        return [tuple(value)]
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, (list, tuple)) else []
