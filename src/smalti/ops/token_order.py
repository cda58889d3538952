"""Orders of tokens on a grid, so that tokens that belong together stand together.

A grid (F, H, W) is cut into groups (gt, gh, gw). Grids that groups do not divide are padded: a padded place is masked
as a key and dropped as a query. Everything here is indices; it depends on shapes alone and is computed once a shape.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class GroupOrder:
    """Tokens group by group.

    Args:
        grid: (F, H, W) of the tokens.
        group: (gt, gh, gw) tokens in a group.
        groups: (Gt, Gh, Gw), how many groups lie along each axis.
        index: for every place of the padded order the token that stands there (P,), 0 where it is padded.
        is_real: which places hold a token (P,).
        inverse: the place of every token (N,).
    """

    grid: Grid
    group: Grid
    groups: Grid
    index: Tensor
    is_real: Tensor
    inverse: Tensor

    @property
    def count(self) -> int:
        """Number of groups G."""
        return math.prod(self.groups)

    @property
    def length(self) -> int:
        """Tokens of a group, padded ones included."""
        return math.prod(self.group)

    @property
    def is_padded(self) -> bool:
        """Whether any place holds no token."""
        return len(self.index) != len(self.inverse)

    def gather(self, x: Tensor) -> Tensor:
        """Tokens (..., N, d) into groups (..., G, g, d); padded places repeat token 0 and must be masked."""
        index = self.index.to(x.device)
        return x.index_select(-2, index).unflatten(-2, (self.count, self.length))

    def scatter(self, x: Tensor) -> Tensor:
        """Groups (..., G, g, d) back into tokens (..., N, d)."""
        return x.flatten(-3, -2).index_select(-2, self.inverse.to(x.device))


@lru_cache(maxsize=64)
def group_order(grid: Grid, group: Grid) -> GroupOrder:
    """The order of a grid in groups.

    Args:
        grid: (F, H, W) tokens; their number is N.
        group: (gt, gh, gw), each at least 1; larger than the grid is cut to it.

    Raises:
        ValueError: a size below 1.
    """
    if min(*grid, *group) < 1:
        raise ValueError(f"got a grid {grid} and groups of {group}; every side is at least 1")
    group = (min(group[0], grid[0]), min(group[1], grid[1]), min(group[2], grid[2]))
    groups = tuple(-(-side // part) for side, part in zip(grid, group, strict=True))
    padded = [count * part for count, part in zip(groups, group, strict=True)]
    places = torch.full(padded, -1, dtype=torch.long)
    places[: grid[0], : grid[1], : grid[2]] = torch.arange(math.prod(grid)).reshape(grid)
    split = places.reshape(groups[0], group[0], groups[1], group[1], groups[2], group[2])
    ordered = split.permute(0, 2, 4, 1, 3, 5).flatten()  # (P,), group by group
    is_real = ordered >= 0
    inverse = torch.empty(math.prod(grid), dtype=torch.long)
    inverse[ordered[is_real]] = torch.arange(len(ordered))[is_real]
    return GroupOrder(grid, group, groups, ordered.clamp_min(0), is_real, inverse)  # type: ignore[arg-type]
