"""Vision encoders: pictures to one feature vector a patch; teachers of aligned models, latents of their own kind.

`VisionTransformer` is a small one of ours. Patches become tokens, positions are added, pre-norm blocks follow, and a
last norm. There is no class token: what is asked of the whole picture is the mean of its patch tokens. Positions are
learned, start as sine-cosine waves, and are resampled with bicubic interpolation where a picture has another grid than
the one that was trained on.

`FeatureTeacher` is what everything else sees, ours or not: a frozen module from pixels in [-1, 1] to patch tokens.

Source: ViT (arXiv 2010.11929), section 3.1 and, for the resampling, 3.2; mean pooling as in its appendix D.3. Teachers:
REPA (arXiv 2410.06940), section 3.2: clean picture, patch tokens after the last norm, no class token.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import interpolate

from smalti.core.errors import UserError
from smalti.nn.encoder_block import NORM_EPS, EncoderBlock, draw_linear_weights
from smalti.nn.patchify import patchify
from smalti.nn.positions import grid_positions
from smalti.ops.token_grid import resize_tokens


class FeatureTeacher(nn.Module, ABC):
    """Pixels (B, 3, H, W) in [-1, 1] -> patch tokens (B, T, D), frozen.

    It stays in evaluation mode whatever a training says, its weights take no gradient, and none passes through it. With
    `.to(torch.bfloat16)` it computes in half precision; its tokens are float32 always.

    Args:
        dim: D.
        patch_size: side of a patch in pixels.
        mean, std: of the colours of the encoder's own training pictures, for values in [0, 1].
        tokens: rows and columns of the tokens, whatever the picture; None = as the picture's size gives them.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        tokens: tuple[int, int] | None = None,
    ):
        super().__init__()
        if tokens is not None and (len(tokens) != 2 or min(tokens) < 1):
            raise UserError(f"tokens of a teacher are {tokens!r}; give rows and columns, each at least 1")
        self.dim, self.patch_size, self.tokens = dim, patch_size, tokens
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @abstractmethod
    def features(self, encoder_input: Tensor) -> Tensor:
        """Patch tokens (B, T, D) after the last norm of what `preprocess` gave."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of a picture of so many pixels."""
        if self.tokens is not None:
            return self.tokens
        return max(1, round(height / self.patch_size)), max(1, round(width / self.patch_size))

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> (B, 3, rows * P, columns * P) in the encoder's own range, float32."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(f"a teacher got pixels of shape {tuple(pixels.shape)}; they must be (B, 3, H, W)")
        rows, columns = self.grid(*pixels.shape[-2:])
        size = (rows * self.patch_size, columns * self.patch_size)
        colours = (pixels.float() + 1) / 2
        if size != tuple(pixels.shape[-2:]):
            colours = interpolate(colours, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return (colours - self.mean.float()) / self.std.float()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens (B, T, D) float32, rows first."""
        return self.features(self.preprocess(pixels)).float()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: a teacher has nothing to learn."""
        return super().train(False)


class VisionTransformer(ModelMixin, ConfigMixin):
    """Pixels (B, 3, H, W) in [-1, 1] -> patch tokens (B, N, D).

    Args:
        in_channels: channels of the pictures.
        patch_size: side of a patch in pixels; height and width are multiples of it.
        depth: number of blocks.
        heads: attention heads.
        head_dim: channels of a head; the width D = heads * head_dim is a multiple of 4.
        base_size: side of the native grid in tokens.
        ffn_ratio: hidden width of the feed-forward layers over D.

    Example:
        >>> VisionTransformer(depth=1, heads=2, head_dim=8)(torch.zeros(1, 3, 64, 128)).shape
        torch.Size([1, 128, 16])
    """

    _no_split_modules = ["EncoderBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch_size: int = 8,
        depth: int = 6,
        heads: int = 6,
        head_dim: int = 32,
        base_size: int = 8,
        ffn_ratio: float = 4.0,
    ):
        super().__init__()
        width = heads * head_dim
        if width % 4:
            raise UserError(f"heads * head_dim is {width}; make it a multiple of 4 for sine-cosine positions")
        self.patch_size, self.width, self.base_size = patch_size, width, base_size
        self.x_embedder = nn.Linear(in_channels * patch_size**2, width)
        waves = grid_positions(base_size, base_size, width, base_size, torch.device("cpu"))
        self.positions = nn.Parameter(waves.clone()[None])  # (1, base_size^2, D)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, ffn_ratio) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, eps=NORM_EPS)
        draw_linear_weights(self)

    @classmethod
    def untrained(cls, seed: int = 0, **settings: Any) -> "VisionTransformer":
        """A transformer of these settings with weights as they are drawn; the same for equal seeds."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(**settings).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens (B, N, D) of pixels (B, 3, H, W), rows first, after the last norm.

        Raises:
            UserError: a side is no multiple of the patch.
        """
        return self.encode(self.embed(pixels))

    def embed(self, pixels: Tensor) -> Tensor:
        """Embedded patches with their positions (B, N, D): what the first block reads."""
        patches = patchify(pixels, self.patch_size).to(self.x_embedder.weight.dtype)
        rows, columns = (side // self.patch_size for side in pixels.shape[-2:])
        return self.x_embedder(patches) + self.grid_positions(rows, columns)

    def encode(self, tokens: Tensor) -> Tensor:
        """Blocks and last norm on embedded tokens (B, n, D), which may be a part of a picture's."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.final_norm(tokens)

    def grid_positions(self, rows: int, columns: int) -> Tensor:
        """The learned positions (1, rows * columns, D), resampled unless this is the native grid."""
        return resize_tokens(self.positions, (self.base_size, self.base_size), (rows, columns), mode="bicubic")
