"""LightningDiT: a DiT with the parts that language models have come to use, each of them a flag.

RMS norms with learned weights in place of layer norms, SwiGLU in place of a GELU layer, rotary positions of queries and
keys beside the fixed ones that are added, optional norms of queries and keys, adaLN with or without its shift, and time
by random frequencies. With all flags off it is `DiT`, weight for weight, so the way from one to the other is a ladder
of flags.

Source: LightningDiT (arXiv 2501.01423), section 4.2 and table 2; time by random frequencies as in RAE (arXiv
2510.11690), appendix. Our SwiGLU has no biases.
"""

from collections.abc import Callable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.backbones.block import TransformerBlock
from smalti.backbones.condition_vector import ConditionVector
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.nn.block_attention import BlockContext, SelfAttention
from smalti.nn.initialise import draw_weights
from smalti.nn.modulation import FinalNorm
from smalti.nn.patchify import patchify, unpatchify
from smalti.nn.positions import grid_positions
from smalti.nn.rope import grid_rope, plane_axes
from smalti.nn.swiglu import SwiGLU

FFN_MULTIPLE = 8


class LightningDiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Transformer over image tokens: `(x, t, cond) -> velocity`.

    Args:
        in_channels: channels of the latents.
        patch_size: side of a patch; height and width are multiples of it.
        depth: number of blocks.
        heads: attention heads.
        head_dim: channels of a head, a multiple of 4.
        num_labels: number of classes; 0 = the model takes no label. Index `num_labels` means "none".
        pooled_dim: channels of the pooled condition; 0 = the model takes none.
        base_size: side of the grid, in tokens, that added positions are scaled to.
        ffn_ratio: hidden width of a feed-forward layer over the width; SwiGLU has two thirds of it, thrice.
        has_rms_norm: RMS norms with learned weights, else layer norms without.
        has_swiglu: gated feed-forward layers.
        has_rope: rotary positions beside the added ones.
        has_qk_norm: RMS norms of queries and keys.
        has_shift: adaLN shifts, scales and gates; False leaves the shift out.
        is_fourier: time by random frequencies.

    Example:
        >>> model = LightningDiT.tiny()
        >>> model(torch.zeros(1, 4, 6, 8), torch.tensor([0.5]), Cond(label=torch.tensor([2]))).shape
        torch.Size([1, 4, 6, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        patch_size: int = 1,
        depth: int = 28,
        heads: int = 16,
        head_dim: int = 72,
        num_labels: int = 0,
        pooled_dim: int = 0,
        base_size: int = 16,
        ffn_ratio: float = 4.0,
        has_rms_norm: bool = True,
        has_swiglu: bool = True,
        has_rope: bool = True,
        has_qk_norm: bool = False,
        has_shift: bool = True,
        is_fourier: bool = False,
    ):
        super().__init__()
        width = heads * head_dim
        self.axes_dims_rope = plane_axes(head_dim) if has_rope else None
        if width % 4:
            raise UserError(f"heads * head_dim is {width}; make it a multiple of 4 for sine-cosine positions")
        self.patch_size, self.width, self.base_size = patch_size, width, base_size
        self.attention_backend = "auto"
        self.gradient_checkpointing = False
        self.x_embedder = nn.Linear(in_channels * patch_size**2, width)
        self.conditions = ConditionVector(width, num_labels, pooled_dim, is_fourier)
        make = lightning_block(width, heads, ffn_ratio, has_rms_norm, has_swiglu, has_qk_norm, has_shift)
        self.blocks = nn.ModuleList(make() for _ in range(depth))
        self.final_norm = FinalNorm(width, has_rms_norm)
        self.proj_out = nn.Linear(width, in_channels * patch_size**2)
        draw_weights(self, (self.conditions,))

    @classmethod
    def tiny(cls) -> "LightningDiT":
        """A model of a few thousand weights, for tests: 4 channels, 3 labels."""
        return cls(in_channels=4, patch_size=2, depth=2, heads=2, head_dim=8, num_labels=3, base_size=4)

    @classmethod
    def tiny_pooled(cls) -> "LightningDiT":
        """One that takes a pooled condition of 10, with the flags that are off by default."""
        return cls(
            in_channels=4, depth=2, heads=2, head_dim=8, pooled_dim=10, base_size=4, has_qk_norm=True, has_shift=False,
            is_fourier=True,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predicts the velocity.

        Args:
            x: noisy latents (B, C, H, W).
            t: times in [0, 1], (B,), or (B, N) for every token its own.
            cond: label (B,) and pooled (B, pooled_dim), each only if the model takes it; a label may be left out.

        Returns:
            (B, C, H, W) in the dtype of x.

        Raises:
            UserError: the conditioning or the size does not fit the model.
        """
        height, width = x.shape[-2:]
        tokens = patchify(x, self.patch_size).to(self.proj_out.bias.dtype)
        vector = self.conditions(t, cond, tokens.shape[1]).whole
        rows, columns = height // self.patch_size, width // self.patch_size
        positions = grid_positions(rows, columns, self.width, self.base_size, x.device)
        tokens = self.x_embedder(tokens) + positions.to(tokens.dtype)  # (B, N, D)
        rope = None if self.axes_dims_rope is None else grid_rope(0, rows, columns, self.axes_dims_rope, x.device)
        context = BlockContext(F.silu(vector), rope, backend=self.attention_backend)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, context)  # type: ignore[misc]
            else:
                tokens = block(tokens, context)
        velocity = self.proj_out(self.final_norm(tokens, context.activated))
        return unpatchify(velocity, (height, width), self.patch_size).to(x.dtype)


def lightning_block(
    width: int,
    heads: int,
    ffn_ratio: float = 4.0,
    has_rms_norm: bool = True,
    has_swiglu: bool = True,
    has_qk_norm: bool = False,
    has_shift: bool = True,
) -> Callable[[], TransformerBlock]:
    """Maker of LightningDiT's blocks; arguments as those of `LightningDiT`."""

    def make() -> TransformerBlock:
        parts: dict[str, Callable[[], nn.Module]] = {"attn": lambda: SelfAttention(width, heads, has_qk_norm)}
        if has_swiglu:
            parts["ffn"] = lambda: SwiGLU(width, ffn_ratio, FFN_MULTIPLE)
        norm_kind = "rms" if has_rms_norm else "layer"
        return TransformerBlock(width, heads, ffn_ratio, norm_kind=norm_kind, has_shift=has_shift, parts=parts)

    return make
