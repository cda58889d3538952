"""How well pictures follow the maps they were drawn for: intersection over union of classes.

    IoU of a class = pixels that have it in both maps / pixels that have it in either,   mIoU = mean over classes

counted over all pictures together; a class that is in no map does not count. Beside the figure stands that of shuffled
maps, each picture against the map of another: what a picture gets for looking like some map.

Source: Everingham et al. 2010, The Pascal VOC Challenge, section 4.3.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smalti.core.errors import UserError


class MapReport(NamedTuple):
    """How pictures fit their maps.

    Args:
        fitting: mIoU with their own maps.
        shuffled: mIoU with those of others.
    """

    fitting: float
    shuffled: float


def mean_iou(found: Tensor, given: Tensor, classes: int) -> float:
    """mIoU of two sets of maps (N, H, W) long with classes below `classes`.

    Raises:
        UserError: shapes differ, or a class is out of range.
    """
    if found.shape != given.shape:
        raise UserError(f"got maps of shapes {tuple(found.shape)} and {tuple(given.shape)}; give equal ones")
    if not all(int(one.min()) >= 0 and int(one.max()) < classes for one in (found, given)):
        raise UserError(f"a map has a class outside of 0 to {classes - 1}; give the number of all classes")
    table = torch.bincount((given * classes + found).flatten(), minlength=classes**2).reshape(classes, classes).double()
    both, either = table.diag(), table.sum(0) + table.sum(1) - table.diag()
    return float((both[either > 0] / either[either > 0]).mean())


def map_report(
    segment: Callable[[Tensor], Tensor], pixels: Tensor, given: Tensor, classes: int, seed: int = 0
) -> MapReport:
    """Figures of pictures that were drawn for maps.

    Args:
        segment: pixels (N, C, H, W) -> maps (N, H, W) long.
        pixels: the pictures.
        given: their maps (N, H, W) long.
        classes: number of all classes.
        seed: of the shuffling, which leaves no picture with its own map.
    """
    found = segment(pixels)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed))
    others = torch.empty_like(order)
    others[order] = order.roll(1)
    return MapReport(mean_iou(found, given, classes), mean_iou(found, given[others], classes))
