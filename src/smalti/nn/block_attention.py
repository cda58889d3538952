"""Attention layers of a block, which take positions, mask, memory and backend from what the block is given.

`SelfAttention` lets tokens attend to each other, `CrossAttention` to those of a memory such as an encoded text:
`softmax(q k^T / sqrt(d)) v` with `q = x Wq` and `k, v` from the tokens or from the memory.

Source: arXiv 1706.03762, sections 3.2.2 and 3.2.3; norms of queries and keys, arXiv 2302.05442, section 2. M memory
tokens.
"""

from typing import NamedTuple

from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.nn.norm import RMSNorm
from smalti.nn.rope import apply_rope
from smalti.ops.attention import attention


class BlockContext(NamedTuple):
    """What all blocks of one call share.

    Args:
        activated: SiLU of the conditioning vector, (B, D) or (B, N, D), or what a modulation that all blocks share
            made of it; None for blocks without modulation.
        rope: rotary factors of the tokens (N, d/2, 2), of a joint sequence's (L, d/2, 2), or None.
        mask: which tokens self-attention may look at, True = attend: (B, N), (B, 1, 1, N) or (B, 1 or h, N, N).
        memory: tokens that cross-attention looks at (B, M, D).
        memory_mask: the same for the memory (B, M).
        backend: of `ops.attention`.
    """

    activated: Tensor | None = None
    rope: Tensor | None = None
    mask: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    backend: str = "auto"


class SelfAttention(nn.Module):
    """Multi-head self-attention with fused projections: (B, N, D) -> (B, N, D).

    Args:
        width: D = heads * head_dim.
        heads: h.
        has_qk_norm: an RMS norm of each head's queries and keys, before they are turned.
    """

    def __init__(self, width: int, heads: int, has_qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(width // heads) if has_qk_norm else None
        self.norm_k = RMSNorm(width // heads) if has_qk_norm else None
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, h, d)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if context.rope is not None:
            q, k = (apply_rope(one.contiguous(), context.rope[:, None]) for one in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = attention(q, k, v, context.mask, backend=context.backend)
        return self.to_out(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention to the memory of the context: (B, N, D) -> (B, N, D).

    Args:
        width: D = heads * head_dim.
        heads: h.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        if context.memory is None:
            raise UserError("a block with cross-attention needs tokens to look at; give the context a memory (B, M, D)")
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, h, N, d)
        k, v = self.to_kv(context.memory).unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, M, h, d)
        out = attention(q, k.transpose(1, 2), v.transpose(1, 2), context.memory_mask, backend=context.backend)
        return self.to_out(out.transpose(1, 2).flatten(2))
