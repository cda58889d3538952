"""Training samples that are views of pictures: moved and zoomed on their white ground, with a caption if asked for.

Pictures are never mirrored: a clock, an arrow, a letter and a flag would become another one. Colours stay, because they
name things ("red heart", "green apple").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from smalti.core.protocols import Batch, Cond
from smalti.core.seeds import rand
from smalti.training.autoencoder import Pictures


@dataclass(frozen=True)
class ViewSource:
    """A `SampleSource` of views of pictures; x0 are pixels (B, 3, H, W), the label is the concept.

    Args:
        pictures: where the pixels come from.
        concepts: concept of each picture (N,) long.
        text: sentence vectors (M, T) of all phrasings; None for none.
        rows: first and one-past-last row of each picture's phrasings (N, 2) long.
        shift: largest shift along each side, as a share of it.
        zoom: least and largest factor on the size of what is drawn.
    """

    pictures: Pictures
    concepts: Tensor
    text: Tensor | None = None
    rows: Tensor | None = None
    shift: float = 0.12
    zoom: tuple[float, float] = (0.75, 1.3)

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """The samples `indices` (B,); one generator for each decides shift, zoom and phrasing."""
        draws = rand((len(indices), 4), generators)  # down, right, zoom, phrasing
        low, high = self.zoom
        zoom = low * (high / low) ** draws[:, 2]
        views = move_and_zoom(self.pictures.pixels(indices.tolist()), (2 * draws[:, :2] - 1) * self.shift, zoom)
        pooled = None
        if self.text is not None and self.rows is not None:
            first, last = self.rows[indices].unbind(1)
            pooled = self.text[first + (draws[:, 3] * (last - first)).long()].float()
        return Batch(views, Cond(pooled=pooled, label=self.concepts[indices]), indices)


def move_and_zoom(pixels: Tensor, shift: Tensor, zoom: Tensor) -> Tensor:
    """Pictures on a white ground moved and zoomed about their middle, bilinearly; what enters is white.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        shift: down and right (B, 2), as shares of the sides.
        zoom: factors on the size (B,).
    """
    inverse = torch.zeros(len(pixels), 2, 3)
    inverse[:, 0, 0] = inverse[:, 1, 1] = 1 / zoom
    inverse[:, :, 2] = -2 * shift.flip(1) / zoom[:, None]
    places = affine_grid(inverse, list(pixels.shape), align_corners=False)
    return grid_sample(pixels - 1, places, align_corners=False) + 1  # zero beyond the border is white
