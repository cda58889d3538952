"""GRAT: tokens in groups, and all queries of a group attend to the same few groups of keys.

The grid of image tokens is cut into groups; a region rule over the grid of groups says which groups a group attends to:

- `block:R`: a window of 2R+1 groups along every axis, moved inwards at the border, so that all groups see equally many;
- `cross`: groups in the same row or column; in video, groups that share a frame, row or column (a union of planes);
- `block:1+cross`: both. `random:n` and `strided:n` attend to n groups chosen blindly: what a rule has to beat.

Text attends to everything and is attended to by everything, its padding by nobody. Positions are not touched: q and k
come after their rotation. Attended share of keys: (2R+1)^2 / G, and (Gh + Gw - 1) / G for `cross` in a picture.

Source: Grouping First, Attending Smartly (arXiv 2505.14687), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.method import CoreCall, CoreMethod
from smalti.core.protocols import TokenLayout
from smalti.ops.block_mask import BlockLayout, block_attention, choose
from smalti.ops.token_order import Grid, GroupOrder, group_order
from smalti.seams.image_attention import check_image_grid, image_grid, keys_alone
from smalti.seams.schedule import is_early


@dataclass(frozen=True)
class GRAT(CoreMethod):
    """Block-sparse attention among groups of image tokens.

    Args:
        group: (frames, rows, columns) of tokens in a group; on a GPU a multiple of 128 tokens is fastest.
        region: cross, block:R, random:n, strided:n, or several joined by +.
        dense_steps: steps at the beginning that keep full attention.

    Raises:
        UserError: a rule that is not known, or a size out of range.
    """

    group: Grid = (1, 4, 4)
    region: str = "cross"
    dense_steps: int = 0

    owns = frozenset({"attention pattern"})
    work = "less"

    def __post_init__(self):
        if len(self.group) != 3 or min(self.group) < 1 or self.dense_steps < 0:
            raise UserError(
                f"got group={self.group}, dense_steps={self.dense_steps}; give three sizes from 1, steps from 0"
            )
        for rule in self.region.split("+"):
            name, _, number = rule.partition(":")
            is_known = rule in ("all", "cross") or (name in ("block", "random", "strided") and number.isdigit())
            if not is_known:
                raise UserError(
                    f"unknown region {rule!r}; give all, cross, block:R, random:n or strided:n, joined by +"
                )

    @classmethod
    def neutral(cls) -> Self:
        return cls(region="all")

    @classmethod
    def active(cls) -> Self:
        return cls(group=(1, 2, 2), region="block:0")

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (cls(group=(1, 1, 2), region="block:0+cross"), cls(group=(1, 2, 2), region="block:0", dense_steps=3))

    @classmethod
    def candidates(cls, steps: int, speedup: float) -> "tuple[Self, ...]":
        return tuple(cls(group, region) for group in ((1, 4, 4), (1, 8, 8)) for region in ("block:1", "cross"))

    @property
    def is_neutral(self) -> bool:
        return self.region == "all"

    def check_cores(self, model: str, cores: Mapping[str, tuple[TokenLayout, TokenLayout]]) -> None:
        check_image_grid(model, cores, "GRAT")

    def idle_reason(self, evaluations: int) -> str:
        return (
            f"in {evaluations} evaluations region {self.region} with groups of {self.group} would have cost as much as "
            f"plain attention, or dense_steps={self.dense_steps} covered all; take smaller groups or a narrower region"
        )

    def at_core(self, state: None, call: CoreCall) -> Tensor:
        grid = image_grid(call.layout, call.key_layout)
        if self.is_neutral or grid is None or is_early(call.moment, self.dense_steps):
            return call.attend(call.q, call.k, call.v, call.mask)
        image = call.layout.span("image")
        layout = region_layout(grid, self.group, self.region, image.start, len(call.layout) - image.stop)
        mask = keys_alone(call.mask, str(call.site))
        backend = choose(layout, call.q.device)
        if backend == "full":
            return call.attend(call.q, call.k, call.v, call.mask)
        call.note(backend)
        backend = "gather" if backend == "flex" and mask is not None else backend
        return block_attention(call.q, call.k, call.v, layout, mask, call.scale, backend)


@lru_cache(maxsize=64)
def region_layout(grid: Grid, group: Grid, region: str, before: int = 0, after: int = 0) -> BlockLayout:
    """Groups and attended groups of a grid of tokens, with so many text tokens before and after."""
    order = group_order(grid, group)
    return BlockLayout(order, region_table(order, region), before, after)


def region_table(order: GroupOrder, region: str) -> Tensor:
    """Which groups a group attends to (G, G), bool: the union of all rules of a region."""
    axes = [torch.arange(count) for count in order.groups]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)  # (G, 3)
    table = torch.eye(len(places), dtype=torch.bool)
    for rule in region.split("+"):
        name, _, number = rule.partition(":")
        if name == "all":
            table = torch.ones_like(table)
        elif name == "cross":
            table |= _cross(places, order.groups)
        elif name == "block":
            table |= _window(places, order.groups, int(number))
        elif name == "random":
            table |= _random(len(places), int(number))
        else:
            table |= _strided(len(places), int(number))
    return table


def _window(places: Tensor, groups: Grid, radius: int) -> Tensor:
    """Windows of 2R+1 groups an axis, moved inwards at the border."""
    inside = torch.ones(len(places), len(places), dtype=torch.bool)
    for axis, count in enumerate(groups):
        width = min(2 * radius + 1, count)
        start = (places[:, axis] - radius).clamp(0, count - width)
        offset = places[None, :, axis] - start[:, None]
        inside &= (offset >= 0) & (offset < width)
    return inside


def _cross(places: Tensor, groups: Grid) -> Tensor:
    """Groups that share a coordinate, along the axes that have more than one group."""
    shared = torch.eye(len(places), dtype=torch.bool)
    for axis, count in enumerate(groups):
        if count > 1:
            shared |= places[:, None, axis] == places[None, :, axis]
    return shared


def _random(count: int, number: int) -> Tensor:
    """Every group attends to itself and to others drawn once, `number` in all."""
    scores = torch.rand(count, count, generator=torch.Generator().manual_seed(0)).fill_diagonal_(-1)
    return scores.argsort(1).argsort(1) < number


def _strided(count: int, number: int) -> Tensor:
    """Every group attends to `number` groups at even distances around the list of groups, itself among them."""
    steps = (torch.arange(min(number, count)) * count) // min(number, count)
    columns = (torch.arange(count)[:, None] + steps[None]) % count
    return torch.zeros(count, count, dtype=torch.bool).scatter_(1, columns, True)
