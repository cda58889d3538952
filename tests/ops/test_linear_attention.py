import torch
from torch.nn.functional import elu

from smalti.ops.linear_attention import linear_attention


def test_it_is_the_attention_of_its_features():
    q, k, v = (torch.randn(2, 3, 11, 8) for _ in range(3))
    scores = (elu(q) + 1) @ (elu(k) + 1).transpose(-1, -2)
    assert torch.allclose(linear_attention(q, k, v), scores / scores.sum(-1, keepdim=True) @ v, atol=1e-5)


def test_a_masked_key_does_not_count():
    q, k, v = (torch.randn(2, 3, 11, 8) for _ in range(3))
    keep = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    keep[1, ..., 7:] = False
    out = linear_attention(q, k, v, keep)
    assert torch.allclose(out[1], linear_attention(q[1:], k[1:, :, :7], v[1:, :, :7])[0], atol=1e-5)
    bias = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    assert torch.allclose(linear_attention(q, k, v, bias), out)
