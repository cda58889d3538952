"""Training samples for inpainting: every time another mask, and the latents of what it leaves.

The hidden part is made grey in the picture, which is encoded after that: an encoder sees beyond the border of a mask,
so latents that are cut out of a whole picture's would tell what is hidden.

Source: LFM (arXiv 2307.08698), its model of inpainting.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smalti.core.protocols import Batch
from smalti.data.masks import KINDS, draw_masks, hide, shrink_mask
from smalti.training.encoded_source import EncodedSource

MASKED, EDIT_MASK = "masked", "edit_mask"
"""Names in `cond.extra`: latents of the masked picture (B, C, h, w); the mask (B, 1, h, w), 1 = to be generated."""


def inpaint_extra(tokenizer: Any, pixels: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What a model of inpainting is given.

    Args:
        tokenizer: `encode(pixels) -> Latents`; its mean is taken.
        pixels: whole pictures (B, 3, H, W) in [-1, 1].
        mask: (B, 1, H, W), 1 = hidden.
    """
    masked = tokenizer.encode(hide(pixels, mask)).tensor
    return {MASKED: masked, EDIT_MASK: shrink_mask(mask, masked.shape[-2:])}


@dataclass(frozen=True)
class InpaintSource:
    """A `SampleSource` of the trainer.

    Args:
        source: of the whole pictures.
        kinds: of masks, names of `data.masks.KINDS`.
    """

    source: EncodedSource
    kinds: Sequence[str] = KINDS

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """The samples `indices` (B,); one generator for each decides all that is random, its mask last."""
        whole = self.source.batch(indices, generators)
        pixels = self.source.pictures.pixels(indices.tolist())
        mask = draw_masks(pixels.shape[-2:], list(generators), len(indices), self.kinds)
        extra = {**whole.cond.extra, **inpaint_extra(self.source.tokenizer, pixels, mask)}
        return replace(whole, cond=replace(whole.cond, extra=extra))
