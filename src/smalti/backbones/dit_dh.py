"""DiT^DH: a deep transformer of modest width, and a shallow wide head that alone meets the width of the latents.

    s = blocks(embed(x) + positions; SiLU(time + conditions))
    s = SiLU(time + s), projected to the head's width
    velocity = head(its own embedding of x; modulated by s, token by token)

A denoiser of width d below the n channels of its tokens cannot even fit one picture: the noise fills all channels, and
of the velocity's variance a share of 1 - d / n does not pass. Here the noisy tokens reach the output through the head,
so only its two blocks have to be wide. The head's modulation differs from token to token, (B, N, D). What the deep part
found changes slowly along a sampling run and may be used again for some steps (`SharedStates`).

Source: RAE (arXiv 2510.11690), section 5 and theorem 1; the split of encoder and decoder, and the reuse between steps,
DDT (arXiv 2504.05741), sections 3.1 and 3.3. Blocks are `lightning_dit`'s.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.backbones.condition_vector import ConditionVector
from smalti.backbones.lightning_dit import lightning_block
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.nn.block_attention import BlockContext
from smalti.nn.initialise import draw_weights
from smalti.nn.modulation import FinalNorm, per_token
from smalti.nn.patchify import patchify, unpatchify
from smalti.nn.positions import grid_positions
from smalti.nn.rope import grid_rope, plane_axes

SHAPES: dict[str, dict[str, Any]] = {
    "s": {"width": (384, 2048), "depth": (12, 2), "heads": (6, 16)},
    "b": {"width": (768, 2048), "depth": (12, 2), "heads": (12, 16)},
    "l": {"width": (1024, 2048), "depth": (24, 2), "heads": (16, 16)},
    "xl": {"width": (1152, 2048), "depth": (28, 2), "heads": (16, 16)},
    "small": {"width": (128, 256), "depth": (8, 2), "heads": (4, 8)},
}
"""The paper's sizes and a small one for two cores, as arguments of `DiTDH`: (deep part, head)."""


class DiTDH(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Transformer with a wide head over image tokens: `(x, t, cond) -> velocity`.

    Args:
        in_channels: channels of the latents.
        patch_size: side of a patch; height and width are multiples of it.
        width: of the deep part and of the head.
        depth: blocks of the deep part and of the head.
        heads: attention heads of both; each width over its heads is a multiple of 4.
        num_labels: number of classes; 0 = the model takes no label. Index `num_labels` means "none".
        pooled_dim: channels of the pooled condition; 0 = the model takes none.
        base_size: side of the grid, in tokens, that added positions are scaled to.
        ffn_ratio: hidden width of a feed-forward layer over its width.
        has_qk_norm: RMS norms of queries and keys.

    Example:
        >>> model = DiTDH.tiny()
        >>> model(torch.zeros(1, 12, 4, 4), torch.tensor([0.5]), Cond(label=torch.tensor([2]))).shape
        torch.Size([1, 12, 4, 4])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 768,
        patch_size: int = 1,
        width: tuple[int, int] = (1152, 2048),
        depth: tuple[int, int] = (28, 2),
        heads: tuple[int, int] = (16, 16),
        num_labels: int = 0,
        pooled_dim: int = 0,
        base_size: int = 16,
        ffn_ratio: float = 4.0,
        has_qk_norm: bool = False,
    ):
        super().__init__()
        if any(one % (4 * parts) for one, parts in zip(width, heads, strict=True)):
            raise UserError(
                f"widths {tuple(width)} and heads {tuple(heads)} do not fit; a head has 4, 8, 12, ... channels"
            )
        values = in_channels * patch_size**2
        self.patch_size, self.width, self.base_size = patch_size, width[0], base_size
        self.axes_dims_rope = [plane_axes(one // parts) for one, parts in zip(width, heads, strict=True)]
        self.attention_backend = "auto"
        self.gradient_checkpointing = False
        self.x_embedder = nn.Linear(values, width[0])
        self.conditions = ConditionVector(width[0], num_labels, pooled_dim, is_fourier=True)
        deep, wide = (
            lightning_block(one, parts, ffn_ratio, has_qk_norm=has_qk_norm) for one, parts in zip(width, heads)
        )
        self.blocks = nn.ModuleList(deep() for _ in range(depth[0]))
        self.to_head = nn.Linear(*width)
        self.head_embedder = nn.Linear(values, width[1])
        self.head = nn.ModuleList(wide() for _ in range(depth[1]))
        self.final_norm = FinalNorm(width[1], is_rms=True)
        self.proj_out = nn.Linear(width[1], values)
        draw_weights(self, (self.conditions,))

    @classmethod
    def tiny(cls) -> "DiTDH":
        """A model of a few thousand weights, for tests: 12 channels, 3 labels, a head that is wider than they are."""
        return cls(
            in_channels=12, width=(8, 16), depth=(2, 1), heads=(2, 2), num_labels=3, base_size=4, ffn_ratio=2.0
        )  # fmt: skip

    @classmethod
    def tiny_patches(cls) -> "DiTDH":
        """One for 4 channels in patches of 2."""
        return cls(
            in_channels=4, patch_size=2, width=(8, 16), depth=(2, 1), heads=(2, 2), num_labels=3, base_size=4
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
        return self.velocity(x, self.states(x, t, cond))

    def states(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the deep part makes of a call's arguments: states s (B, N, D of the head), before the last SiLU."""
        tokens = self._tokens(x)
        vectors = self.conditions(t, cond, tokens.shape[1])
        grid = self._grid(x)
        positions = grid_positions(*grid, self.width, self.base_size, x.device)
        tokens = self.x_embedder(tokens) + positions.to(tokens.dtype)
        rope = grid_rope(0, *grid, self.axes_dims_rope[0], x.device)
        tokens = self._run(
            self.blocks, tokens, BlockContext(F.silu(vectors.whole), rope, backend=self.attention_backend)
        )
        return self.to_head(F.silu(per_token(vectors.time) + tokens))

    def velocity(self, x: Tensor, states: Tensor) -> Tensor:
        """The head alone: noisy latents (B, C, H, W) and states (B, N, D), of this call or of an earlier one."""
        rope = grid_rope(0, *self._grid(x), self.axes_dims_rope[1], x.device)
        activated = F.silu(states)
        tokens = self.head_embedder(self._tokens(x))
        tokens = self._run(self.head, tokens, BlockContext(activated, rope, backend=self.attention_backend))
        velocity = self.proj_out(self.final_norm(tokens, activated))
        return unpatchify(velocity, x.shape[-2:], self.patch_size).to(x.dtype)

    def _tokens(self, x: Tensor) -> Tensor:
        return patchify(x, self.patch_size).to(self.proj_out.bias.dtype)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        return x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size

    def _run(self, blocks: nn.ModuleList, tokens: Tensor, context: BlockContext) -> Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, context)  # type: ignore[misc]
            else:
                tokens = block(tokens, context)
        return tokens


class SharedStates:
    """A denoiser for one sampling run, in which the deep part runs in one call of `every` alone.

    Args:
        model: a `DiTDH`.
        every: calls that share states, at least 1; counted apart for each conditioning, so guidance may call in turn.

    Example:
        >>> shared = SharedStates(DiTDH.tiny(), every=2)
        >>> shared(torch.zeros(1, 12, 4, 4), torch.tensor([1.0]), Cond()).shape
        torch.Size([1, 12, 4, 4])
    """

    def __init__(self, model: DiTDH, every: int):
        if every < 1:
            raise UserError(f"states cannot be shared by {every} calls; give at least 1, which shares nothing")
        self.model, self.every = model, every
        self._kept: dict[int, tuple[Cond, int, Tensor]] = {}  # by identity; the Cond is held so that it stays unique

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity, as of the model."""
        _, calls, states = self._kept.get(id(cond), (cond, 0, x))
        if calls % self.every == 0:
            states = self.model.states(x, t, cond)
        self._kept[id(cond)] = (cond, calls + 1, states)
        return self.model.velocity(x, states)
