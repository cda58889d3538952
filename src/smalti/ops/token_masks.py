"""Which tokens of a grid stay while a model trains: drawn for each sample, equally many in all.

Every sample has its own generator, so its mask does not depend on its batch. Masks hide single tokens anywhere, or
whole blocks of them (an ablation). A ratio of 0 draws nothing at all: the training is then the plain one, bit for bit.

Source: MAE (arXiv 2111.06377), section 3, shuffles and takes the first; MicroDiT (arXiv 2407.15811), section 3.1.
N tokens of a grid, n kept, ascending.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Generators
from smalti.core.seeds import rand

KEEP = "keep"
"""Under this name kept places (B, n) reach a denoiser in `cond.extra`; without it all tokens are there."""


@dataclass(frozen=True)
class Kept:
    """A mask of each sample.

    Args:
        keep: places of the tokens that stay (B, n), ascending.
        drop: places of the others (B, N - n), ascending.
    """

    keep: Tensor
    drop: Tensor

    @property
    def restore(self) -> Tensor:
        """(B, N): where each place is found in [kept, dropped], which `gather` with it puts back in order."""
        return torch.cat([self.keep, self.drop], 1).argsort(1)

    @property
    def mask(self) -> Tensor:
        """(B, N), True = kept."""
        whole = torch.zeros(len(self.keep), self.keep.shape[1] + self.drop.shape[1], dtype=torch.bool)
        return whole.to(self.keep.device).scatter(1, self.keep, True)


class TokenMask(Protocol):
    """Draws masks."""

    def draw(self, rows: int, columns: int, samples: int, generator: Generators) -> Kept | None:
        """Masks of so many samples for a grid, on the CPU; None = all tokens stay."""
        ...


@dataclass(frozen=True)
class RandomMask:
    """Tokens anywhere.

    Args:
        ratio: share that is dropped, in [0, 1); at least one token stays.
    """

    ratio: float = 0.75

    def __post_init__(self):
        check_ratio(self.ratio)

    def draw(self, rows: int, columns: int, samples: int, generator: Generators) -> Kept | None:
        """See `TokenMask`."""
        if self.ratio == 0:
            return None
        return _first(rand((samples, rows * columns), generator), kept_count(rows * columns, self.ratio))


@dataclass(frozen=True)
class BlockMask:
    """Square blocks of tokens that stay or go together.

    Args:
        ratio: share of the blocks that is dropped, in [0, 1); at least one stays.
        side: of a block, in tokens; divides both sides of the grid.
    """

    ratio: float = 0.75
    side: int = 2

    def __post_init__(self):
        check_ratio(self.ratio)

    def draw(self, rows: int, columns: int, samples: int, generator: Generators) -> Kept | None:
        """See `TokenMask`."""
        if rows % self.side or columns % self.side:
            raise UserError(f"blocks of side {self.side} do not fill a grid of {rows} x {columns}; choose a divisor")
        if self.ratio == 0:
            return None
        blocks = (rows // self.side, columns // self.side)
        order = rand((samples, *blocks), generator)
        kept = kept_count(blocks[0] * blocks[1], self.ratio)
        rank = order.flatten(1).argsort(1).argsort(1).unflatten(1, blocks)
        spread = rank.repeat_interleave(self.side, 1).repeat_interleave(self.side, 2).flatten(1)
        return _first(spread, kept * self.side**2)


def kept_count(tokens: int, ratio: float) -> int:
    """How many of so many tokens stay."""
    return max(1, round(tokens * (1 - ratio)))


def check_ratio(ratio: float) -> None:
    """Raises `UserError` unless a share of tokens stays."""
    if not 0 <= ratio < 1:
        raise UserError(f"a mask ratio of {ratio} is out of range; choose one from 0 (nothing dropped), below 1")


def _first(order: Tensor, count: int) -> Kept:
    """The `count` tokens of lowest order (B, N) stay."""
    keep, drop = order.argsort(dim=1, stable=True).tensor_split([count], dim=1)
    return Kept(keep.sort(1).values, drop.sort(1).values)
