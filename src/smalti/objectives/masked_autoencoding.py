"""Pictures learn from themselves: most patches are hidden, and a small decoder must paint them from the rest.

The encoder reads only the visible quarter of the patches. Its tokens, put back in their places among copies of one
learned mask token, pass a narrow decoder that predicts every patch's pixels, normalised within the patch:
`target = (p - mean p) / sqrt(var p + floor)`; the loss is the squared error over hidden patches alone.

Source: MAE (arXiv 2111.06377), sections 3 and 4.1. Drawings have flat patches, whose normalisation would blow up the
noise of their compression; hence a floor of the variance that is higher than in the paper's code (1e-6).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smalti.core.protocols import Batch, Generators, LossResult, TrainState
from smalti.core.seeds import rand
from smalti.nn.encoder_block import NORM_EPS, EncoderBlock, draw_linear_weights
from smalti.nn.patchify import patchify
from smalti.nn.positions import grid_positions
from smalti.objectives.caption_contrast import take_tokens


class MaskedAutoencoder(nn.Module):
    """An encoder with the decoder that only its training needs.

    Args:
        encoder: has `embed(pixels) -> (B, N, D)` and `encode(tokens) -> (B, n, D)`.
        width: D.
        base_size: side of the grid in tokens.
        patch_values: numbers in a patch, 3 * P * P.
        decoder_width: of the decoder, a multiple of 4.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        base_size: int,
        patch_values: int,
        decoder_width: int = 128,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
    ):
        super().__init__()
        self.base_size, self.decoder_width = base_size, decoder_width
        self.to_decoder = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(decoder_width))
        self.blocks = nn.ModuleList(EncoderBlock(decoder_width, decoder_heads) for _ in range(decoder_depth))
        self.final_norm = nn.LayerNorm(decoder_width, eps=NORM_EPS)
        self.proj_out = nn.Linear(decoder_width, patch_values)
        draw_linear_weights(self)
        nn.init.normal_(self.mask_token, std=0.02)
        self.encoder = encoder

    def forward(self, pixels: Tensor, visible: Tensor) -> Tensor:
        """Predicted patches (B, N, 3*P*P) of pixels (B, 3, H, W) of which the patches `visible` (B, n) are seen."""
        tokens = take_tokens(self.encoder.embed(pixels), visible)  # type: ignore[operator]
        seen = self.to_decoder(self.encoder.encode(tokens))  # type: ignore[operator]
        patches = self.base_size**2
        places = visible[..., None].expand(-1, -1, self.decoder_width)
        whole = self.mask_token.to(seen.dtype).expand(len(seen), patches, -1).scatter(1, places, seen)
        whole = whole + grid_positions(self.base_size, self.base_size, self.decoder_width, self.base_size, seen.device)
        for block in self.blocks:
            whole = block(whole)
        return self.proj_out(self.final_norm(whole))


@dataclass(frozen=True)
class MaskedAutoencoding:
    """Objective of a `MaskedAutoencoder`; the batch's x0 are pixels (B, 3, H, W) in [-1, 1].

    Args:
        patch_size: P.
        hidden: share of the patches that is hidden, in (0, 1).
        floor: added to the variance of a patch, for values in [-1, 1].
    """

    patch_size: int
    hidden: float = 0.75
    floor: float = 1e-2

    def loss(self, denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """`denoiser` is the model: `(pixels, visible) -> patches`."""
        target = normalised_patches(batch.x0, self.patch_size, self.floor)
        count, patches = target.shape[:2]
        order = rand((count, patches), generator, target.device).argsort(1)
        visible, masked = order.tensor_split([max(1, round((1 - self.hidden) * patches))], dim=1)
        predicted = denoiser(batch.x0, visible)
        error = (take_tokens(predicted, masked) - take_tokens(target, masked)).square().mean()
        return LossResult(error, {})


def normalised_patches(pixels: Tensor, patch: int, floor: float) -> Tensor:
    """Patches (B, N, 3*P*P) of pixels (B, 3, H, W), each of zero mean and of unit variance unless it is flat."""
    patches = patchify(pixels, patch)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
    return (patches - mean) / (variance + floor).sqrt()
