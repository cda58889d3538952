"""Self- and cross-attention follow their formula, masks keep tokens out."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.nn.block_attention import BlockContext, CrossAttention, SelfAttention

D, HEADS = 8, 2


def by_hand(q, k, v, mask):
    """One head after the other."""
    out = []
    for a, b, c in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1)):
        scores = a @ b.transpose(-1, -2) / (D / HEADS) ** 0.5
        out.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ c)
    return torch.cat(out, -1)


def test_self_attention_by_hand():
    layer, x = SelfAttention(D, HEADS), torch.randn(2, 5, D)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    q, k, v = layer.to_qkv(x).chunk(3, -1)
    expected = layer.to_out(by_hand(q, k, v, mask))
    for backend in ("sdpa", "math"):
        given = BlockContext(mask=mask.expand(2, 1, 5, 5), backend=backend)
        torch.testing.assert_close(layer(x, given), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_by_hand():
    layer, x, memory = CrossAttention(D, HEADS), torch.randn(2, 5, D), torch.randn(2, 3, D)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    k, v = layer.to_kv(memory).chunk(2, -1)
    expected = layer.to_out(by_hand(layer.to_q(x), k, v, mask[:, None].expand(2, 5, 3)))
    given = BlockContext(memory=memory, memory_mask=mask)
    torch.testing.assert_close(layer(x, given), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="give the context a memory"):
        layer(x, BlockContext())
