"""Attention with a norm of queries and keys over all heads together, of a width of its own, without biases.

`softmax(q k^T / sqrt(d)) v` with `q = norm(x Wq)`, `k = norm(m Wk)`: layer norms over the whole attention width A =
heads * head_dim, before the split into heads; A may be smaller than the width D of the tokens.

Source: the norm of queries and keys, arXiv 2302.05442, section 2; over the whole width as in MicroDiT (arXiv
2407.15811, section 3.3 and its code). Layers take what `nn.block_attention` takes; rotary factors may differ from
sample to sample, as those of kept tokens do.
"""

from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.nn.block_attention import BlockContext
from smalti.nn.modulation import EPS
from smalti.nn.rope import apply_rope
from smalti.ops.attention import attention


class WideSelfAttention(nn.Module):
    """Self-attention: (B, N, D) -> (B, N, D).

    Args:
        width: D.
        heads: h.
        head_dim: d; A = h * d.
    """

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.norm_q = nn.LayerNorm(heads * head_dim, EPS, bias=False)
        self.norm_k = nn.LayerNorm(heads * head_dim, EPS, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """The context's rope is (N, d/2, 2), or (B, N, d/2, 2) where samples keep different tokens."""
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)  # (B, N, A)
        q, k, v = (one.unflatten(-1, (self.heads, -1)) for one in (self.norm_q(q), self.norm_k(k), v))
        if context.rope is not None:
            q, k = (apply_rope(one.contiguous(), context.rope.unsqueeze(-3)) for one in (q, k))
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))  # (B, h, N, d)
        out = attention(q, k, v, context.mask, backend=context.backend)
        return self.to_out(out.transpose(1, 2).flatten(2))


class WideCrossAttention(nn.Module):
    """Attention to the memory of the context, from tokens that pass a norm of its own: (B, N, D) -> (B, N, D).

    Args:
        width: D, of the tokens and of the memory.
        heads: h.
        head_dim: d; A = h * d.
    """

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, EPS, bias=False)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.norm_q = nn.LayerNorm(heads * head_dim, EPS, bias=False)
        self.norm_k = nn.LayerNorm(heads * head_dim, EPS, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        if context.memory is None:
            raise UserError("a block with cross-attention needs tokens to look at; give the context a memory (B, M, D)")
        k, v = self.to_kv(context.memory).chunk(2, dim=-1)  # (B, M, A)
        q, k, v = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in (self.norm_q(self.to_q(self.norm(x))), self.norm_k(k), v)
        )  # (B, h, N or M, d)
        out = attention(q, k, v, context.memory_mask, backend=context.backend)
        return self.to_out(out.transpose(1, 2).flatten(2))
