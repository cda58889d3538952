"""A patch-mixer: a few narrow blocks that all tokens pass before most of them are dropped.

What a dropped patch shows has by then reached its neighbours, so the deep backbone behind learns from all of the
picture while it computes on a part of the tokens:

    x <- Lin_in(norm(x)), D -> Dm;   mixer blocks on all N tokens;   x <- x[keep];   x <- Lin_out(norm(x)), Dm -> D

The way back to D comes after the gather, where it is cheap; at Dm = D there is none in either direction. Mixer blocks
have their own view of time and caption.

Source: MicroDiT (arXiv 2407.15811), section 3.1 and figure 3.
"""

from torch import Tensor, nn

from smalti.backbones.block import TransformerBlock
from smalti.backbones.block_order import with_cross
from smalti.core.errors import UserError
from smalti.nn.block_attention import BlockContext
from smalti.nn.encoder_block import draw_linear_weights
from smalti.nn.experts import ExpertChoice
from smalti.nn.modulation import EPS, Modulation
from smalti.nn.swiglu import SwiGLU
from smalti.nn.wide_attention import WideCrossAttention, WideSelfAttention
from smalti.ops.token_subset import gather


class PatchMixer(nn.Module):
    """All tokens in, the kept ones out: (B, N, D) -> (B, n, D).

    Args:
        width: D of the tokens, of the conditioning vector and of the memory.
        mixer_width: Dm, a multiple of head_dim.
        depth: number of blocks.
        head_dim: d.
        has_memory: whether the blocks look at a memory.
        ffn_ratio: hidden width over Dm.
        ffn_multiple: of the hidden width.
        experts: of every second block; 0 = all blocks are dense.
        capacity: experts a token has on average.
    """

    def __init__(
        self,
        width: int,
        mixer_width: int,
        depth: int,
        head_dim: int,
        has_memory: bool = True,
        ffn_ratio: float = 4.0,
        ffn_multiple: int = 256,
        experts: int = 0,
        capacity: float = 2.0,
    ):
        super().__init__()
        if depth < 1 or mixer_width % head_dim:
            raise UserError(
                f"got a mixer of depth {depth} and width {mixer_width}; give at least one block, and a multiple of "
                f"head_dim {head_dim}"
            )
        self.enter, self.leave, self.memory_in = nn.Identity(), nn.Identity(), nn.Identity()
        if mixer_width != width:
            self.enter, self.leave = _resize(width, mixer_width), _resize(mixer_width, width)
            self.memory_in = _resize(width, mixer_width) if has_memory else nn.Identity()
        self.vector_in = nn.Linear(width, mixer_width)
        self.blocks = nn.ModuleList(
            micro_block(
                mixer_width, mixer_width // head_dim, head_dim, has_memory, ffn_ratio, ffn_multiple,
                experts if index % 2 else 0, capacity,
            )
            for index in range(depth)
        )  # fmt: skip
        draw_linear_weights(self)
        for module in self.modules():  # every block starts as the identity
            if isinstance(module, Modulation | WideCrossAttention):
                nn.init.zeros_((module.linear if isinstance(module, Modulation) else module.to_out).weight)

    def forward(self, x: Tensor, context: BlockContext, keep: Tensor | None = None) -> Tensor:
        """Mixes.

        Args:
            x: all tokens (B, N, D), with their positions.
            context: of the backbone's blocks; its rope, if any, is that of all tokens.
            keep: places that stay (B, n), see `ops.token_masks`; None = all.
        """
        assert context.activated is not None
        memory = None if context.memory is None else self.memory_in(context.memory)
        own = context._replace(activated=self.vector_in(context.activated), memory=memory)
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, own)
        return self.leave(x if keep is None else gather(x, keep))


def _resize(width: int, other: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width, EPS, bias=False), nn.Linear(width, other, bias=False))


def micro_block(
    width: int,
    heads: int,
    head_dim: int,
    has_memory: bool,
    ffn_ratio: float,
    ffn_multiple: int = 256,
    experts: int = 0,
    capacity: float = 2.0,
) -> TransformerBlock:
    """MicroDiT's block: adaLN self-attention, cross-attention behind a plain norm, adaLN feed-forward or experts.

    Args:
        width: D.
        heads: of self-attention, whose width may be below D; cross-attention has that of D.
        head_dim: d.
        has_memory: whether there is cross-attention.
        ffn_ratio: hidden width over D, of one expert too.
        ffn_multiple: of the hidden width of SwiGLU.
        experts: number of experts; 0 = SwiGLU.
        capacity: experts a token has on average.
    """
    return TransformerBlock(
        width,
        heads,
        order=with_cross("standard") if has_memory else "standard",
        bare_cross=True,
        parts={
            "attn": lambda: WideSelfAttention(width, heads, head_dim),
            "cross": lambda: WideCrossAttention(width, width // head_dim, head_dim),
            "ffn": lambda: (
                ExpertChoice(width, int(width * ffn_ratio), experts, capacity)
                if experts
                else SwiGLU(width, ffn_ratio, ffn_multiple)
            ),
        },
    )
