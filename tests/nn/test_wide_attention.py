"""Attention whose queries and keys are normed over all heads, of a width of its own."""

import pytest
import torch
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.nn.block_attention import BlockContext
from smalti.nn.rope import rope_factors
from smalti.nn.wide_attention import WideCrossAttention, WideSelfAttention
from smalti.ops.token_subset import gather


def plain(q, k, v, heads):
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k, v))
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (scores @ v).transpose(1, 2).flatten(2)


def test_self_attention_norms_over_the_whole_width():
    layer, x = WideSelfAttention(12, heads=2, head_dim=4), torch.randn(2, 5, 12)
    q, k, v = layer.to_qkv(x).chunk(3, -1)
    assert q.shape[-1] == 8
    expected = plain(F.layer_norm(q, (8,)), F.layer_norm(k, (8,)), v, 2) @ layer.to_out.weight.T
    torch.testing.assert_close(layer(x, BlockContext()), expected, atol=1e-5, rtol=1e-4)
    assert all(parameter.ndim == 2 or name.endswith("weight") for name, parameter in layer.named_parameters())


def test_cross_attention_needs_a_memory_and_heeds_its_mask():
    layer, x, memory = WideCrossAttention(12, 2, 4), torch.randn(2, 5, 12), torch.randn(2, 3, 12)
    with pytest.raises(UserError, match="memory"):
        layer(x, BlockContext())
    mask = torch.tensor([[True, True, False]] * 2)
    masked = layer(x, BlockContext(memory=memory, memory_mask=mask))
    torch.testing.assert_close(masked, layer(x, BlockContext(memory=memory[:, :2])))


def test_rotary_factors_of_kept_tokens_move_with_them():
    """Attention among kept tokens equals attention among all in which the others are masked."""
    layer, x = WideSelfAttention(8, 2, 4), torch.randn(2, 6, 8)
    rope = rope_factors(torch.arange(6.0)[:, None], (4,))
    keep = torch.tensor([[0, 2, 5], [1, 3, 4]])
    mask = torch.zeros(2, 6, dtype=torch.bool).scatter(1, keep, True)
    whole = gather(layer(x, BlockContext(rope=rope, mask=mask)), keep)
    part = layer(gather(x, keep), BlockContext(rope=gather(rope[None], keep)))
    torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)
    wrong = layer(gather(x, keep), BlockContext(rope=rope[:3]))
    assert (wrong - whole).abs().max() > 1e-3
