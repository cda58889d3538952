"""MicroDiT: a text-to-picture transformer built to be trained on few tokens.

Patches with fixed positions pass a patch-mixer; then, while it trains, most are dropped and the deep blocks see the
rest; what they predict returns to its places, zeros in the others. Blocks grow from first to last, in feed-forward and
in attention, and every second one has experts that choose their tokens. A caption's tokens pass an MLP and one block of
self-attention; their mean is added to the time.

The places that stay come in `cond.extra["keep"]`; without it all tokens stay, as in sampling. Without a mixer this is
naive masking, and with a decoder, that fills dropped places by a learned token, MaskDiT: the two baselines.

Source: MicroDiT (arXiv 2407.15811), sections 3.1 to 3.3 and appendix A; the decoder, MaskDiT (arXiv 2306.09305),
section 3.2. Rotary positions are ours: those of kept tokens are gathered with them.
"""

import math
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.backbones.caption_embedder import CaptionEmbedder
from smalti.backbones.patch_mixer import PatchMixer, micro_block
from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import Cond
from smalti.nn.block_attention import BlockContext
from smalti.nn.embeddings import LabelEmbedder, TimeEmbedder
from smalti.nn.initialise import draw_weights
from smalti.nn.modulation import FinalNorm
from smalti.nn.patchify import patchify, unpatchify
from smalti.nn.positions import grid_positions
from smalti.nn.rope import grid_rope, plane_axes
from smalti.nn.wide_attention import WideCrossAttention
from smalti.objectives.edm import Preconditioning
from smalti.ops.token_masks import KEEP
from smalti.ops.token_subset import gather, scatter

POSITIONS = ("absolute", "rope")
SHAPES: dict[str, dict[str, Any]] = {
    "xl": {"depth": 28, "width": 1024, "head_dim": 64, "mixer_depth": 6, "mixer_width": 768},
    "paper-tiny": {"depth": 16, "width": 512, "head_dim": 32, "mixer_depth": 4, "mixer_width": 512},
    "small": {"depth": 8, "width": 128, "head_dim": 32, "mixer_depth": 2, "mixer_width": 128, "ffn_multiple": 16},
}
"""The paper's MicroDiT-XL/2 and its Tiny one, and a small one for two cores, as arguments of `MicroDiT`."""


class MicroDiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Transformer over image tokens, whole or masked: `(x, t, cond) -> velocity`.

    Args:
        in_channels: channels of the latents.
        patch_size: side of a patch.
        depth: blocks of the backbone.
        width: D, a multiple of head_dim.
        head_dim: channels of a head, a multiple of 4.
        text_dim: channels of the caption's tokens.
        num_labels: number of classes; 0 = the model takes no label.
        mixer_depth: blocks of the patch-mixer; 0 = none, tokens are dropped as they enter.
        mixer_width: Dm, a multiple of head_dim; 0 = D.
        decoder_depth: blocks that see all places again, dropped ones as a learned token; 0 = none.
        ffn_ratios: hidden width over D in the first and the last block; between them it grows evenly.
        attention_ratios: width of self-attention over D, likewise.
        ffn_multiple: of the hidden width of dense blocks.
        experts: of every second block, in the mixer too, except the last; 0 = all blocks are dense.
        capacity: experts a token has on average.
        positions: absolute, added to tokens before any is dropped; rope, gathered with the kept ones.
        base_size: side of the grid, in tokens, that absolute positions are scaled to, whatever the picture's size.
        sigma_data: standard deviation of the latents for EDM's preconditioning; 0 = the network gives the velocity.

    Example:
        >>> model = MicroDiT.tiny()
        >>> cond = Cond(text=torch.zeros(1, 5, 12), extra={"keep": torch.tensor([[0, 3, 7]])})
        >>> model(torch.zeros(1, 4, 8, 8), torch.tensor([0.5]), cond).shape
        torch.Size([1, 4, 8, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: int = 2,
        depth: int = 28,
        width: int = 1024,
        head_dim: int = 64,
        text_dim: int = 1024,
        num_labels: int = 0,
        mixer_depth: int = 6,
        mixer_width: int = 768,
        decoder_depth: int = 0,
        ffn_ratios: tuple[float, float] = (0.5, 4.0),
        attention_ratios: tuple[float, float] = (0.5, 1.0),
        ffn_multiple: int = 256,
        experts: int = 8,
        capacity: float = 2.0,
        positions: Literal["absolute", "rope"] = "absolute",
        base_size: int = 16,
        sigma_data: float = 0.0,
    ):
        super().__init__()
        if width % head_dim or head_dim % 4:
            raise UserError(f"width {width} and head_dim {head_dim} do not fit; give a multiple of it, and it one of 4")
        if positions not in POSITIONS:
            raise unknown_name("positions", positions, POSITIONS)
        self.patch_size, self.width, self.base_size = patch_size, width, base_size
        self.axes_dims_rope = plane_axes(head_dim) if positions == "rope" else None
        self.attention_backend = "auto"
        self.gradient_checkpointing = False
        self.preconditioning = Preconditioning(sigma_data) if sigma_data else None
        self.x_embedder = nn.Linear(in_channels * patch_size**2, width)
        self.time_embedder = TimeEmbedder(width)
        self.label_embedder = LabelEmbedder(num_labels, width) if num_labels else None
        self.caption_embedder = CaptionEmbedder(text_dim, width, head_dim, ffn_multiple)
        self.mixer = None
        if mixer_depth:
            self.mixer = PatchMixer(
                width, mixer_width or width, mixer_depth, head_dim, True, 4.0, ffn_multiple, experts, capacity
            )
        self.blocks = nn.ModuleList(
            micro_block(
                width, heads_of(attention, width, head_dim), head_dim, True, ffn, ffn_multiple,
                experts if index % 2 and index < depth - 1 else 0, capacity,
            )
            for index, (ffn, attention) in enumerate(zip(growing(ffn_ratios, depth), growing(attention_ratios, depth)))
        )  # fmt: skip
        self.mask_token = nn.Parameter(torch.zeros(width)) if decoder_depth else None
        self.decoder = nn.ModuleList(
            micro_block(width, width // head_dim, head_dim, True, 4.0, ffn_multiple) for _ in range(decoder_depth)
        )
        self.final_norm = FinalNorm(width)
        self.proj_out = nn.Linear(width, in_channels * patch_size**2)
        draw_weights(self, (self.time_embedder, self.label_embedder, self.caption_embedder.pooled))
        self._zero_residuals()

    @classmethod
    def tiny(cls) -> "MicroDiT":
        """A model of a few thousand weights, for tests: 4 channels, text 12, one block of experts, a mixer."""
        return cls(
            in_channels=4, depth=3, width=24, head_dim=8, text_dim=12, mixer_depth=1, mixer_width=16, ffn_multiple=8,
            experts=2, num_labels=3, base_size=4,
        )  # fmt: skip

    @classmethod
    def tiny_edm(cls) -> "MicroDiT":
        """One with EDM's preconditioning and rotary positions, without mixer, labels and experts."""
        return cls(
            in_channels=4, depth=2, width=16, head_dim=8, text_dim=12, mixer_depth=0, ffn_multiple=8, experts=0,
            positions="rope", sigma_data=0.9,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predicts the velocity.

        Args:
            x: noisy latents (B, C, H, W).
            t: times (B,) in [0, 1].
            cond: text (B, M, text_dim) with an optional mask (B, M), a label (B,) if the model takes one, and the
                places of the tokens that stay in `extra["keep"]` (B, n); without them all stay.

        Returns:
            (B, C, H, W) in the dtype of x. Where tokens were dropped, the network's output is zero.

        Raises:
            UserError: the conditioning or the size does not fit the model.
        """
        self._check(x, t, cond)
        if self.preconditioning is None:
            return self.network(x, t, cond)
        scaled = self.preconditioning.scale(x.float(), t)
        output = self.network(scaled.x.to(x.dtype), scaled.time, cond)
        return self.preconditioning.velocity(x.float(), output.float(), t).to(x.dtype)

    def network(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The network itself: scaled latents (B, C, H, W) and its own time (B,) to an output of the shape of x."""
        height, width = x.shape[-2:]
        rows, columns = height // self.patch_size, width // self.patch_size
        tokens = self.x_embedder(patchify(x, self.patch_size).to(self.proj_out.bias.dtype))  # (B, N, D)
        places, rope = None, None
        if self.axes_dims_rope is None:
            places = grid_positions(rows, columns, self.width, self.base_size, x.device).to(tokens.dtype)
            tokens = tokens + places
        else:
            rope = grid_rope(0, rows, columns, self.axes_dims_rope, x.device)
        assert cond.text is not None  # checked
        caption = self.caption_embedder(cond.text.to(tokens.dtype), cond.mask, self.attention_backend)
        vector = self.time_embedder(time) + caption.vector
        if self.label_embedder is not None:
            vector = vector + self.label_embedder(cond.label, len(x))
        context = BlockContext(
            F.silu(vector), rope, memory=caption.tokens, memory_mask=cond.mask, backend=self.attention_backend
        )
        keep = cond.extra.get(KEEP)
        tokens = self._enter(tokens, context, keep)
        within = context if rope is None or keep is None else context._replace(rope=gather(rope[None], keep))
        for block in self.blocks:
            tokens = self._run(block, tokens, within)
        if self.mask_token is not None:
            tokens = self._decode(tokens, context, keep, places, rows * columns)
            keep = None
        output = self.proj_out(self.final_norm(tokens, context.activated))
        if keep is not None:
            output = scatter(output, keep, output.new_zeros(len(x), rows * columns, output.shape[-1]))
        return unpatchify(output, (height, width), self.patch_size).to(x.dtype)

    def _enter(self, tokens: Tensor, context: BlockContext, keep: Tensor | None) -> Tensor:
        if self.mixer is not None:
            return self.mixer(tokens, context, keep)
        return tokens if keep is None else gather(tokens, keep)

    def _decode(
        self, tokens: Tensor, context: BlockContext, keep: Tensor | None, places: Tensor | None, count: int
    ) -> Tensor:
        """All places again (B, N, D): dropped ones begin as the mask token with its position."""
        assert self.mask_token is not None
        if keep is not None:
            whole = self.mask_token.to(tokens.dtype).expand(len(tokens), count, -1)
            tokens = scatter(tokens, keep, whole if places is None else whole + places)
        for block in self.decoder:
            tokens = self._run(block, tokens, context)
        return tokens

    def _run(self, block: nn.Module, *inputs):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)  # type: ignore[misc]  # set by ModelMixin
        return block(*inputs)

    def _zero_residuals(self) -> None:
        """Cross-attention and the caption's block have no gate that starts at zero: their outputs do."""
        for module in self.modules():
            if isinstance(module, WideCrossAttention):
                nn.init.zeros_(module.to_out.weight)
        self.caption_embedder.start_as_identity()

    def _check(self, x: Tensor, t: Tensor, cond: Cond) -> None:
        if t.shape != x.shape[:1]:
            raise UserError(f"MicroDiT takes one time a sample (B,), got t {tuple(t.shape)} for x {tuple(x.shape)}")
        if cond.text is None:
            raise UserError("this MicroDiT needs cond.text; for no caption give zeros, or an encoded empty one")
        if cond.label is not None and self.label_embedder is None:
            raise UserError("this MicroDiT takes no cond.label, because its num_labels is 0; leave the label out")


def growing(ends: tuple[float, float], depth: int) -> list[float]:
    """One number a block, evenly from the first to the last (section 3.3, layer-wise scaling)."""
    first, last = ends
    return [first + (last - first) * index / max(1, depth - 1) for index in range(depth)]


def heads_of(ratio: float, width: int, head_dim: int) -> int:
    """Heads of an attention that is at least `ratio` of D wide: an even number, or all that D has."""
    return min(width // head_dim, 2 * math.ceil(int(ratio * width) / (2 * head_dim)))
