"""What attention within a circle costs, counted without making its mask: attended keys, score products, FLOPs.

One score product is 4 d FLOPs a head: d multiply-adds for the score and d for the value.
"""

import math
from dataclasses import dataclass

import torch

from smalti.ops.circle_mask import CircleLayout, Shape, is_near
from smalti.ops.token_order import Grid


@dataclass(frozen=True)
class CircleCost:
    """Score products of one attention, for one head and sample.

    Args:
        full: of plain attention.
        exact: inside the circle, with text and pooled keys.
        computed: of what the layout's groups compute.
        attended: share of image keys that a mean image query attends to.
    """

    full: int
    exact: int
    computed: int
    attended: float

    @property
    def saved(self) -> float:
        """Share of the FLOPs of plain attention that the circle does without."""
        return 1 - self.exact / self.full

    def flops(self, heads: int, head_dim: int) -> float:
        """FLOPs of the exact circle for one sample."""
        return 4.0 * self.exact * heads * head_dim


def near_pairs(grid: Grid, radius: float, shape: Shape = "circle") -> int:
    """How many (query, key) pairs of image tokens lie within the circle."""
    frames, rows, columns = grid
    down, right = torch.arange(1 - rows, rows), torch.arange(1 - columns, columns)
    near = is_near(down[:, None], right[None], radius, shape)
    return frames**2 * int(((rows - down.abs())[:, None] * (columns - right.abs()) * near).sum())


def circle_cost(layout: CircleLayout, pool: int | None = None) -> CircleCost:
    """The report for a layout and cells of `pool` x `pool` tokens."""
    blocks, order = layout.blocks, layout.blocks.order
    frames, rows, columns = order.grid
    tokens, text = math.prod(order.grid), blocks.before + blocks.after
    cells = frames * -(-rows // pool) * -(-columns // pool) if pool else 0
    pairs = near_pairs(order.grid, layout.radius, layout.shape)
    needed = int(blocks.table.sum()) * order.length**2
    of_text = text * (tokens + text)
    shared = tokens * (text + cells)
    return CircleCost((tokens + text) ** 2, pairs + shared + of_text, needed + shared + of_text, pairs / tokens**2)
