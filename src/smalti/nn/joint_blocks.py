"""Attention of a joint-attention transformer (MMDiT), and its block on one joint stream.

Text and image have projections of their own and meet in one attention over the joint sequence, text first; queries and
keys pass an RMS norm before their rotation. `SingleBlock`: one stream, attention and feed-forward in parallel from the
same norm; the block on two streams is `backbones.block.JointBlock`. M text tokens, N image tokens, L = M + N.

Source: Stable Diffusion 3 (arXiv 2403.03206, figure 2) for joint attention; parallel single blocks (arXiv 2302.05442,
section 2) and their combination as in FLUX.1.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from smalti.nn.block_attention import BlockContext
from smalti.nn.ffn import FeedForward
from smalti.nn.modulation import ModulatedNorm, Modulation, gated_add
from smalti.nn.norm import RMSNorm
from smalti.nn.rope import norm_rope
from smalti.ops.attention import attention

EPS = 1e-6


class Streams(NamedTuple):
    """The two token streams: text (B, M, D) and image (B, N, D)."""

    text: Tensor
    image: Tensor


def attend_qkv(qkv: Tensor, weight: Tensor, heads: int, context: BlockContext) -> Tensor:
    """Attention from fused projections.

    Args:
        qkv: queries, keys and values side by side (B, L, 3*D).
        weight: norm weights of queries and keys (L or 1, 2, 1, d).
        heads: h.
        context: of the call.

    Returns:
        (B, L, D)
    """
    qk, v = qkv.unflatten(-1, (3, heads, -1)).split([2, 1], dim=2)  # (B, L, 2 | 1, h, d); one split, one cat backward
    assert context.rope is not None
    q, k = norm_rope(qk, weight, context.rope[:, None, None], EPS).unbind(2)  # (B, L, h, d)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v.squeeze(2)))  # (B, h, L, d)
    return attention(q, k, v, context.mask, backend=context.backend).transpose(1, 2).flatten(2)


class StreamProjections(nn.Module):
    """The projections of one stream: fused `to_qkv`, the norms of queries and keys, and `to_out`.

    Args:
        width: D.
        head_dim: d.
    """

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(head_dim, EPS)
        self.norm_k = RMSNorm(head_dim, EPS)
        self.to_out = nn.Linear(width, width)

    def norm_weight(self) -> Tensor:
        """Weights of both norms (1, 2, 1, d)."""
        return torch.stack([self.norm_q.weight, self.norm_k.weight])[None, :, None]


class StreamAttention(StreamProjections):
    """Attention over one stream, or over the joint sequence of two whose other projections are given."""

    def forward(
        self,
        x: Tensor,
        heads: int,
        context: BlockContext,
        text: Tensor | None = None,
        of_text: StreamProjections | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends over one sequence, or over the joint one of two streams.

        Args:
            x: the stream of these projections (B, N, D).
            heads: h.
            context: of the call.
            text: a second stream (B, M, D), which stands first in the joint sequence.
            of_text: its projections.

        Returns:
            The streams' outputs: of x (B, N, D), and of the text (B, M, D) or None.
        """
        if text is None or of_text is None:
            return self.to_out(attend_qkv(self.to_qkv(x), self.norm_weight(), heads, context)), None
        length = text.shape[1]
        weight = torch.cat(
            [
                of_text.norm_weight().expand(length, -1, -1, -1),
                self.norm_weight().expand(x.shape[1], -1, -1, -1),
            ]
        )
        joint = attend_qkv(torch.cat([of_text.to_qkv(text), self.to_qkv(x)], dim=1), weight, heads, context)
        return self.to_out(joint[:, length:]), of_text.to_out(joint[:, :length])


class SingleBlock(nn.Module):
    """One joint stream; attention and feed-forward side by side under one gate.

    Args:
        width: D = heads * head_dim.
        heads: h.
        ffn_ratio: hidden width of the feed-forward layer over D.
    """

    feeders = {"join": ("norm", "attn", "ffn")}  # read by methods: without the sum, none of these need run

    def __init__(self, width: int, heads: int, ffn_ratio: float = 4.0):
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(width, sublayers=1)
        self.attn = StreamAttention(width, width // heads)
        self.ffn = FeedForward(width, ffn_ratio, bias_out=False)  # to_out has the bias of their sum
        self.norm, self.join = ModulatedNorm(), Sum()

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """The joint sequence (B, L, D), text first, to the same shape."""
        assert context.activated is not None
        (triple,) = self.modulation(context.activated)
        normed = self.norm(x, triple.shift, triple.scale)
        attended, _ = self.attn(normed, self.heads, context)
        return gated_add(x, triple.gate, self.join(attended, self.ffn(normed)))


class Sum(nn.Module):
    """The sum of two tensors, as a place in a block where methods can put another in."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other
