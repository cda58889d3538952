"""Several pictures on one canvas: a grid of equal panels whose borders lie on the borders of tokens.

A set of P related pictures is drawn as one picture, tiled in reading order; a model of pictures then draws the set in
one go, because every panel attends to the others. A panel whose border cut through a token would share that token with
its neighbour, so sizes are checked against what a token covers.

Source: In-Context LoRA (arXiv 2410.23775), section 3.2 (images are concatenated, not tokens).
Letters: P panels; h, w sides of a panel.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from smalti.core.errors import UserError

LARGEST = 16
"""Most panels of a canvas."""


class Box(NamedTuple):
    """Where a panel lies: rows `top` to `bottom`, columns `left` to `right`, the ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Of the last two axes."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class PanelLayout:
    """A grid of equal panels in reading order.

    Args:
        rows, columns: of the grid, together 2 to 16 panels.

    Raises:
        UserError: there are fewer or more panels.

    Example:
        >>> PanelLayout.named("1x2").boxes(64, 128)[1]
        Box(top=0, left=64, bottom=64, right=128)
    """

    rows: int
    columns: int

    def __post_init__(self):
        if self.rows < 1 or self.columns < 1 or not 2 <= self.count <= LARGEST:
            raise UserError(f"got a layout of {self.rows}x{self.columns}; choose 2 to {LARGEST} panels, such as 1x2")

    @classmethod
    def named(cls, name: str) -> Self:
        """The layout of a name `ROWSxCOLUMNS`."""
        found = re.fullmatch(r"(\d+)x(\d+)", name)
        if found is None:
            raise UserError(f"got a layout {name!r}; give ROWSxCOLUMNS, such as 1x2 (side by side) or 2x2")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def count(self) -> int:
        """Number of panels."""
        return self.rows * self.columns

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the canvas of panels of this size."""
        return height * self.rows, width * self.columns

    def boxes(self, height: int, width: int, multiple: int = 1) -> tuple[Box, ...]:
        """The boxes of all panels on a canvas.

        Args:
            height, width: of the canvas, in any unit (pixels, latents or tokens).
            multiple: what one token covers in this unit: downsampling times patch in pixels, the patch in latents.

        Raises:
            UserError: a border would not lie on the border of a token.
        """
        for side, length, parts in (("height", height, self.rows), ("width", width, self.columns)):
            step = parts * multiple
            if length < step or length % step:
                near = max(1, round(length / step)) * step
                raise UserError(
                    f"a canvas {side} of {length} cannot be cut into {parts} panels on borders of tokens of "
                    f"{multiple}; choose a multiple of {step}, such as {near}"
                )
        h, w = height // self.rows, width // self.columns
        return tuple(
            Box(row * h, column * w, (row + 1) * h, (column + 1) * w)
            for row in range(self.rows)
            for column in range(self.columns)
        )

    def assemble(self, panels: Sequence[Tensor], multiple: int = 1) -> Tensor:
        """One canvas (..., H, W) of P panels (..., h, w) of equal shape, pictures or latents.

        Raises:
            UserError: their number or shapes do not fit, or a side is no multiple of `multiple`.
        """
        shapes = {tuple(one.shape) for one in panels}
        if len(panels) != self.count or len(shapes) != 1:
            raise UserError(
                f"got {len(panels)} panels of shapes {sorted(shapes)} for a layout of {self}; "
                f"give {self.count} of one shape"
            )
        *front, h, w = shapes.pop()
        height, width = self.size(h, w)
        canvas = panels[0].new_empty(*front, height, width)
        for box, panel in zip(self.boxes(height, width, multiple), panels, strict=True):
            canvas[(..., *box.slices)] = panel
        return canvas

    def split(self, canvas: Tensor, multiple: int = 1) -> list[Tensor]:
        """The panels (..., h, w) of a canvas (..., H, W), as views."""
        height, width = canvas.shape[-2:]
        return [canvas[(..., *box.slices)] for box in self.boxes(height, width, multiple)]

    def mask(self, panels: Iterable[int], height: int, width: int, multiple: int = 1) -> Tensor:
        """True (H, W) on the given panels of a canvas.

        Raises:
            UserError: there is no such panel.
        """
        boxes, mask = self.boxes(height, width, multiple), torch.zeros(height, width, dtype=torch.bool)
        for panel in panels:
            if not 0 <= panel < self.count:
                raise UserError(f"there is no panel {panel} in a layout of {self}; choose 0 to {self.count - 1}")
            mask[boxes[panel].slices] = True
        return mask
