"""MMDiT: a transformer over text and image tokens with joint attention, the structure of FLUX.1.

Double blocks (own weights for text and image), then single blocks on the joint sequence, adaLN modulation by time,
pooled text and an optional label, rotary positions over (frame, row, column), RMS norm of queries and keys. With
converted weights it equals diffusers' `FluxTransformer2DModel` (see `flux_weights`). It predicts the velocity at t in
[0, 1], 0 = data.

Source: Stable Diffusion 3 (arXiv 2403.03206); FLUX.1 (black-forest-labs/flux). Initialisation as in DiT
(arXiv 2212.09748): every block is the identity and the output zero at the start.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.backbones.block import JointBlock
from smalti.backbones.block_order import Order
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.nn.block_attention import BlockContext
from smalti.nn.embeddings import LabelEmbedder, TimeEmbedder, VectorEmbedder
from smalti.nn.initialise import draw_weights
from smalti.nn.joint_blocks import SingleBlock
from smalti.nn.modulation import FinalNorm
from smalti.nn.patchify import patchify, unpatchify
from smalti.nn.pruned import Shapes, reshape
from smalti.nn.rope import grid_rope


class MMDiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Joint-attention transformer: `(x, t, cond) -> velocity`.

    Args:
        in_channels: channels of the latents.
        patch_size: side of a patch; height and width are multiples of it.
        num_double: number of double blocks.
        num_single: number of single blocks.
        heads: attention heads.
        head_dim: channels of a head; the width is heads * head_dim.
        text_dim: channels of the text tokens.
        pooled_dim: channels of the pooled text.
        num_labels: number of styles or classes; 0 = the model takes no label. Index `num_labels` means "none".
        guidance_embeds: whether the guidance scale is an input (guidance-distilled models).
        axes_dims_rope: channels of the three rotary axes (frame, row, column); their sum is head_dim.
        ffn_ratio: hidden width of a block's feed-forward layers together, over the width.
        block_order: sublayers of a double block, a name of `block_order.ORDERS` or a list of (sublayer, factor).
        pruned: layers that are smaller than these numbers make them, written by `acceleration.ecodiff.prune`.

    Example:
        >>> model = MMDiT.tiny()
        >>> cond = Cond(text=torch.zeros(1, 3, 12), pooled=torch.zeros(1, 10))
        >>> model(torch.zeros(1, 4, 6, 8), torch.tensor([0.5]), cond).shape
        torch.Size([1, 4, 6, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JointBlock", "SingleBlock"]
    _repeated_blocks = ["JointBlock", "SingleBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        patch_size: int = 1,
        num_double: int = 1,
        num_single: int = 4,
        heads: int = 6,
        head_dim: int = 32,
        text_dim: int = 384,
        pooled_dim: int = 384,
        num_labels: int = 0,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, ...] = (8, 12, 12),
        ffn_ratio: float = 4.0,
        block_order: str | Order = "standard",
        pruned: Shapes | None = None,
    ):
        super().__init__()
        axes = tuple(axes_dims_rope)
        if len(axes) != 3 or sum(axes) != head_dim or any(dim % 2 for dim in axes):
            raise UserError(f"axes_dims_rope {axes} must be three even numbers with the sum head_dim = {head_dim}")
        width = heads * head_dim
        self.axes_dims_rope = axes
        self.patch_size = patch_size
        self.attention_backend = "auto"
        self.rope_theta = 10000.0
        self.gradient_checkpointing = False
        self.x_embedder = nn.Linear(in_channels * patch_size**2, width)
        self.text_embedder = nn.Linear(text_dim, width)
        self.time_embedder = TimeEmbedder(width)
        self.pooled_embedder = VectorEmbedder(pooled_dim, width)
        self.guidance_embedder = TimeEmbedder(width) if guidance_embeds else None
        self.label_embedder = LabelEmbedder(num_labels, width) if num_labels else None
        self.double_blocks = nn.ModuleList(JointBlock(width, heads, ffn_ratio, block_order) for _ in range(num_double))
        self.single_blocks = nn.ModuleList(SingleBlock(width, heads, ffn_ratio) for _ in range(num_single))
        self.final_norm = FinalNorm(width)
        self.proj_out = nn.Linear(width, in_channels * patch_size**2)
        embedders = (self.time_embedder, self.pooled_embedder, self.guidance_embedder, self.label_embedder)
        draw_weights(self, embedders)
        reshape(self, pruned or {})

    @classmethod
    def tiny(cls) -> "MMDiT":
        """A model of a few thousand weights, for tests: 4 channels, text 12, pooled 10, 3 labels."""
        return cls(
            in_channels=4,
            patch_size=2,
            num_single=2,
            heads=2,
            head_dim=8,
            text_dim=12,
            pooled_dim=10,
            num_labels=3,
            axes_dims_rope=(2, 2, 4),
        )

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predicts the velocity.

        Args:
            x: noisy latents of pictures (B, C, H, W) or clips (B, C, F, H, W).
            t: times (B,) in [0, 1].
            cond: text (B, M, text_dim) and pooled (B, pooled_dim); optional mask (B, M), label (B,), guidance (B,).

        Returns:
            The shape and dtype of x.

        Raises:
            UserError: the conditioning or the size does not fit the model.
        """
        self._check(x, t, cond)
        size = x.shape[2:]
        dtype = self.proj_out.bias.dtype  # a bias keeps its dtype where weights are quantised
        image = self.x_embedder(patchify(x, self.patch_size).to(dtype))  # (B, N, D)
        text = self.text_embedder(_given(cond.text, "text").to(dtype))  # (B, M, D)
        length = text.shape[1]
        rows, columns = (side // self.patch_size for side in size[-2:])
        context = BlockContext(
            activated=F.silu(self.vector(t, cond)),
            rope=grid_rope(length, rows, columns, self.axes_dims_rope, x.device, size[:-2].numel(), self.rope_theta),
            mask=_joint_mask(cond.mask, image.shape[1]),
            backend=self.attention_backend,
        )
        for block in self.double_blocks:
            text, image = self._run(block, text, image, context)
        joint = torch.cat([text, image], dim=1)  # (B, M + N, D)
        for block in self.single_blocks:
            joint = self._run(block, joint, context)
        velocity = self.proj_out(self.final_norm(joint[:, length:], context.activated))
        return unpatchify(velocity, size, self.patch_size).to(x.dtype)

    def vector(self, t: Tensor, cond: Cond) -> Tensor:
        """The conditioning vector (B, D): time, guidance, pooled text and label, embedded and added."""
        dtype = self.proj_out.bias.dtype
        vector = self.time_embedder(t)
        if self.guidance_embedder is not None:
            vector = vector + self.guidance_embedder(_given(cond.guidance, "guidance"))
        vector = vector + self.pooled_embedder(_given(cond.pooled, "pooled").to(dtype))
        if self.label_embedder is not None:
            vector = vector + self.label_embedder(cond.label, t.shape[0])
        return vector

    def _run(self, block: nn.Module, *inputs):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)  # type: ignore[misc]  # set by ModelMixin
        return block(*inputs)

    def _check(self, x: Tensor, t: Tensor, cond: Cond) -> None:
        if t.ndim != 1 or t.shape[0] != x.shape[0]:
            raise UserError(f"MMDiT takes one time a sample (B,), got t {tuple(t.shape)} for x {tuple(x.shape)}")
        if cond.guidance is not None and self.guidance_embedder is None:
            raise UserError("this MMDiT takes no cond.guidance, because its guidance_embeds is off; leave it out")
        if cond.label is not None and self.label_embedder is None:
            raise UserError("this MMDiT takes no cond.label, because its num_labels is 0; leave the label out")


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise UserError(f"this MMDiT needs cond.{name}, got None; for no prompt give the embedding of an empty one")
    return tensor


def _joint_mask(mask: Tensor | None, image_length: int) -> Tensor | None:
    """Keep-mask of text (B, M) -> of the joint sequence (B, 1, 1, M + N); image tokens are always kept."""
    if mask is None:
        return None
    return F.pad(mask, (0, image_length), value=True)[:, None, None]
