import torch

from smalti.ops.attention import attention
from smalti.ops.lse_merge import Partial, mass, merge


def partial(q, k, v):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return Partial(scores.softmax(-1) @ v, scores.logsumexp(-1))


def test_parts_merge_to_the_whole_with_gradients():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 13, 13))
    parts = [partial(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 4), slice(4, 5), slice(5, 13))]
    merged, whole = merge(parts), attention(q, k, v, backend="math")
    assert torch.allclose(merged.out, whole, atol=1e-6)
    assert torch.allclose(sum(mass(part, merged) for part in parts), torch.ones(2, 3, 5))
    one, other = (torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True) for out in (merged.out, whole))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


def test_a_part_without_keys_counts_nothing():
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 6, 4)
    empty = Partial(torch.zeros(1, 1, 3, 4), torch.full((1, 1, 3), -torch.inf))
    assert torch.equal(merge([partial(q, k, k), empty]).out, partial(q, k, k).out)
