"""A transformer that paints pictures from latents: one token a latent, one patch of pixels a token.

Latents are embedded, fixed sine-cosine positions are added, a learned token that stands for the whole picture comes in
front, pre-norm blocks follow, and a last linear map gives the pixels of each patch. It predicts colours as the encoder
of the latents sees them, `(c - mean) / std` for c in [0, 1]; `forward` undoes that.

Source: the decoder of MAE (arXiv 2111.06377), section 3, as RAE (arXiv 2510.11690), section 3.1, uses it. The last map
is written as a convolution of side 1, which the balance of losses in `training.tokenizer` looks for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.nn.encoder_block import NORM_EPS, EncoderBlock, draw_linear_weights
from smalti.nn.patchify import patchify
from smalti.nn.positions import grid_positions

SHAPES = {
    "small": {"depth": 6, "width": 192, "heads": 6, "ffn_ratio": 4.0},
    "b": {"depth": 12, "width": 768, "heads": 12, "ffn_ratio": 4.0},
    "l": {"depth": 24, "width": 1024, "heads": 16, "ffn_ratio": 4.0},
    "xl": {"depth": 28, "width": 1152, "heads": 16, "ffn_ratio": 4096 / 1152},
}
"""The paper's decoders, and a small one for two cores, as arguments of `ViTDecoder`."""


class ViTDecoder(nn.Module):
    """Latents (B, C, h, w) -> pixels (B, 3, h * P, w * P), about [-1, 1] and not clamped.

    Args:
        in_channels: C.
        patch_size: P, the side in pixels of what one latent becomes.
        depth: blocks.
        width: D, a multiple of 4 and of heads.
        heads: attention heads.
        ffn_ratio: hidden width of the feed-forward layers over D.
        base_size: side of the grid that positions are scaled to.
        mean, std: of the colours, for values in [0, 1].

    Example:
        >>> ViTDecoder(12, 4, depth=1, width=8, heads=2)(torch.zeros(1, 12, 3, 2)).shape
        torch.Size([1, 3, 12, 8])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        depth: int = 6,
        width: int = 192,
        heads: int = 6,
        ffn_ratio: float = 4.0,
        base_size: int = 8,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        if width % 4 or width % heads:
            raise UserError(
                f"a decoder of width {width} with {heads} heads cannot be built; give a multiple of both 4 and it"
            )
        self.patch_size, self.width, self.base_size = patch_size, width, base_size
        self.x_embedder = nn.Linear(in_channels, width)
        self.whole = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, ffn_ratio) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, eps=NORM_EPS)
        draw_linear_weights(self)
        nn.init.normal_(self.whole, std=0.02)
        self.proj_out = nn.Conv2d(width, 3 * patch_size**2, 1)
        nn.init.normal_(self.proj_out.weight, std=0.02)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        tokens = self._tokens(z)
        patches = self.proj_out(tokens.mT.unflatten(2, z.shape[-2:]))  # (B, 3*P*P, h, w)
        colours = F.pixel_shuffle(patches, self.patch_size) * self.std + self.mean
        return 2 * colours - 1

    @torch.no_grad()
    def start_linear(self, z: Tensor, pixels: Tensor, penalty: float = 1e-5) -> None:
        """Begins as the best linear map from latents (B, C, h, w) to their pixels (B, 3, h * P, w * P).

        The blocks begin as the identity, the first map keeps lengths, and the last one is found by ridge regression.
        Training then has to learn what a linear map cannot do.
        """
        nn.init.orthogonal_(self.x_embedder.weight)
        for block in self.blocks:
            assert isinstance(block, EncoderBlock)
            for layer in (block.attn.to_out, block.ffn.proj_out):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        known = F.pad(self._tokens(z).flatten(0, 1).double(), (0, 1), value=1.0)  # (B*N, D + 1)
        colours = ((pixels + 1) / 2 - self.mean) / self.std
        target = patchify(colours, self.patch_size).flatten(0, 1).double()
        gram = known.T @ known + penalty * len(known) * torch.eye(known.shape[1], dtype=known.dtype, device=z.device)
        found = torch.linalg.solve(gram, known.T @ target)  # (D + 1, 3*P*P)
        self.proj_out.weight.copy_(found[:-1].T[..., None, None])
        assert self.proj_out.bias is not None
        self.proj_out.bias.copy_(found[-1])

    def _tokens(self, z: Tensor) -> Tensor:
        """What the last map reads (B, N, D)."""
        rows, columns = z.shape[-2:]
        tokens = self.x_embedder(z.flatten(2).mT.to(self.whole.dtype))  # (B, N, D)
        tokens = tokens + grid_positions(rows, columns, self.width, self.base_size, z.device).to(tokens.dtype)
        tokens = torch.cat([self.whole.expand(len(z), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.final_norm(tokens)[:, 1:]  # without the token of the whole
