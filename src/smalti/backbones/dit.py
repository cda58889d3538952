"""DiT: the plain diffusion transformer for class, pooled or text conditions.

Tokens with fixed sine-cosine positions pass blocks of self-attention and feed-forward, each shifted, scaled and gated
by a vector of time, label and pooled condition. With converted weights it equals diffusers' `DiTTransformer2DModel`
(see `dit_weights`). With a text width the blocks look at the prompt's tokens too, by cross-attention behind
self-attention, without norm or gate. It predicts the velocity at t in [0, 1], 0 = data; times may differ from token to
token.

Source: DiT (arXiv 2212.09748), adaLN-Zero blocks of its figure 3; text as in PixArt-alpha (arXiv 2310.00426), section
2.3 and figure 4, with `modulation="shared"` its adaLN-single. Unlike diffusers' DiT, which gives every block its own
copy, one embedder of time and label serves all blocks, as in the paper.
"""

from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.backbones.block import TransformerBlock
from smalti.backbones.block_order import Order, entries_of, with_cross
from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import Cond
from smalti.nn.block_attention import BlockContext, CrossAttention
from smalti.nn.embeddings import LabelEmbedder, TimeEmbedder, VectorEmbedder
from smalti.nn.initialise import draw_weights
from smalti.nn.modulation import EPS, FinalNorm, Modulation, per_token
from smalti.nn.patchify import patchify, unpatchify
from smalti.nn.positions import grid_positions
from smalti.nn.pruned import Shapes, reshape


class DiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Transformer over image tokens: `(x, t, cond) -> velocity`.

    Args:
        in_channels: channels of the latents.
        patch_size: side of a patch; height and width are multiples of it.
        depth: number of blocks.
        heads: attention heads.
        head_dim: channels of a head; the width heads * head_dim is a multiple of 4.
        num_labels: number of classes; 0 = the model takes no label. Index `num_labels` means "none".
        pooled_dim: channels of the pooled condition; 0 = the model takes none.
        text_dim: channels of the prompt's tokens; 0 = the model takes none.
        base_size: side of the grid, in tokens, that positions are scaled to.
        ffn_ratio: hidden width of a block's feed-forward layers together, over the width.
        ffn_norm_eps: epsilon of the norm before a feed-forward layer.
        block_order: sublayers of a block, a name of `block_order.ORDERS` or a list of (sublayer, factor).
        modulation: own, a linear layer in every block, or shared, one for all of them and a table in each.
        learn_sigma: predict 2 * in_channels, the second half being a variance, as the paper's class models do.
        pruned: layers that are smaller than these numbers make them, written by `acceleration.ecodiff.prune`.

    Example:
        >>> model = DiT.tiny()
        >>> cond = Cond(label=torch.tensor([2]), pooled=torch.zeros(1, 10))
        >>> model(torch.zeros(1, 4, 6, 8), torch.tensor([0.5]), cond).shape
        torch.Size([1, 4, 6, 8])
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
        depth: int = 12,
        heads: int = 6,
        head_dim: int = 64,
        num_labels: int = 0,
        pooled_dim: int = 0,
        text_dim: int = 0,
        base_size: int = 16,
        ffn_ratio: float = 4.0,
        ffn_norm_eps: float = EPS,
        learn_sigma: bool = False,
        block_order: str | Order = "standard",
        modulation: Literal["own", "shared"] = "own",
        pruned: Shapes | None = None,
    ):
        super().__init__()
        width = heads * head_dim
        if width % 4:
            raise UserError(f"heads * head_dim is {width}; make it a multiple of 4 for sine-cosine positions")
        if modulation not in ("own", "shared"):
            raise unknown_name("modulation of a DiT", modulation, ("own", "shared"))
        self.patch_size, self.width, self.base_size = patch_size, width, base_size
        self.attention_backend = "auto"
        self.gradient_checkpointing = False
        self.x_embedder = nn.Linear(in_channels * patch_size**2, width)
        self.time_embedder = TimeEmbedder(width, shift=1)
        self.label_embedder = LabelEmbedder(num_labels, width) if num_labels else None
        self.pooled_embedder = VectorEmbedder(pooled_dim, width) if pooled_dim else None
        self.text_embedder = text_projection(text_dim, width) if text_dim else None
        self.shared_modulation = Modulation(width, len(entries_of(block_order))) if modulation == "shared" else None
        order = with_cross(block_order) if text_dim else block_order
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width, heads, ffn_ratio, order, modulation=modulation, ffn_norm_eps=ffn_norm_eps, bare_cross=True
            )
            for _ in range(depth)
        )
        self.final_norm = FinalNorm(width)
        self.proj_out = nn.Linear(width, in_channels * (1 + learn_sigma) * patch_size**2)
        embedders = (self.time_embedder, self.label_embedder, self.pooled_embedder, self.text_embedder)
        draw_weights(self, embedders)
        for module in self.modules():
            if isinstance(module, CrossAttention):  # it has no gate that starts at zero
                nn.init.zeros_(module.to_out.weight)
        reshape(self, pruned or {})

    @classmethod
    def tiny_text(cls) -> "DiT":
        """A model with cross-attention to text of 12 channels and one modulation for all blocks, for tests."""
        return cls(
            in_channels=4, depth=2, heads=2, head_dim=8, num_labels=3, pooled_dim=10, text_dim=12, base_size=4,
            modulation="shared",
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> "DiT":
        """A model of a few thousand weights, for tests: 4 channels, 3 labels, pooled 10."""
        return cls(in_channels=4, depth=2, heads=2, head_dim=8, num_labels=3, pooled_dim=10, base_size=4)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predicts the velocity.

        Args:
            x: noisy latents (B, C, H, W).
            t: times in [0, 1], (B,), or (B, N) for every token its own.
            cond: label (B,), pooled (B, pooled_dim) and text (B, M, text_dim) with an optional mask (B, M), each only
                if the model takes it; a label may be left out.

        Returns:
            (B, C, H, W), or (B, 2*C, H, W) with `learn_sigma`, in the dtype of x.

        Raises:
            UserError: the conditioning or the size does not fit the model.
        """
        height, width = x.shape[-2:]
        tokens = patchify(x, self.patch_size).to(self.proj_out.bias.dtype)
        self._check(t, tokens, cond)
        rows, columns = height // self.patch_size, width // self.patch_size
        positions = grid_positions(rows, columns, self.width, self.base_size, x.device)
        tokens = self.x_embedder(tokens)  # (B, N, D)
        tokens = tokens + positions.to(tokens.dtype)
        activated = F.silu(self.vector(t, cond))
        given = activated if self.shared_modulation is None else self.shared_modulation.linear(activated)
        memory = None
        if self.text_embedder is not None:
            assert cond.text is not None  # checked
            memory = self.text_embedder(cond.text.to(tokens.dtype))
        context = BlockContext(given, memory=memory, memory_mask=cond.mask, backend=self.attention_backend)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, context)  # type: ignore[misc]
            else:
                tokens = block(tokens, context)
        velocity = self.proj_out(self.final_norm(tokens, activated))
        return unpatchify(velocity, (height, width), self.patch_size).to(x.dtype)

    def vector(self, t: Tensor, cond: Cond) -> Tensor:
        """The conditioning vector, (B, D) for t (B,), (B, N, D) for t (B, N)."""
        vector = self.time_embedder(t)
        added = []
        if self.label_embedder is not None:
            added.append(self.label_embedder(cond.label, t.shape[0]))
        if self.pooled_embedder is not None and cond.pooled is not None:
            added.append(self.pooled_embedder(cond.pooled.to(vector.dtype)))
        for part in added:
            vector = vector + (per_token(part) if vector.ndim == 3 else part)
        return vector

    def _check(self, t: Tensor, tokens: Tensor, cond: Cond) -> None:
        if t.shape not in (tokens.shape[:1], tokens.shape[:2]):
            raise UserError(
                f"got t {tuple(t.shape)}; for x it must be {tuple(tokens.shape[:1])} or {tuple(tokens.shape[:2])}"
            )
        if cond.label is not None and self.label_embedder is None:
            raise UserError("this DiT takes no cond.label, because its num_labels is 0; leave the label out")
        if (cond.pooled is None) == (self.pooled_embedder is not None):
            state = "needs" if cond.pooled is None else "takes no"
            raise UserError(f"this DiT {state} cond.pooled, because its pooled_dim is {self.config['pooled_dim']}")
        if cond.text is None and self.text_embedder is not None:
            raise UserError(f"this DiT needs cond.text, because its text_dim is {self.config['text_dim']}")


def text_projection(text_dim: int, width: int) -> nn.Sequential:
    """Tokens of the prompt (B, M, text_dim) -> (B, M, D), as PixArt-alpha's caption projection."""
    return nn.Sequential(nn.Linear(text_dim, width), nn.GELU("tanh"), nn.Linear(width, width))
