"""The backends of attention agree in values and gradients, with and without masks, at odd sizes; so does the LSE."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.ops import attention as module
from smalti.ops.attention import BACKENDS, attention, attention_with_lse


def tensors(dtype=torch.float32):
    return [torch.randn(2, 3, n, 5, dtype=dtype, requires_grad=True) for n in (7, 11, 11)]


def masks():
    keys = torch.rand(2, 11) > 0.4
    keys[:, 0] = True
    full = torch.rand(2, 3, 7, 11) > 0.4
    full[..., 2] = True
    return {"none": None, "keys": keys, "broadcast": keys[:, None, None], "full": full}


@pytest.mark.parametrize("kind", ["none", "keys", "broadcast", "full"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_backends_agree(kind, scale):
    mask, inputs = masks()[kind], tensors()
    results = {}
    for backend in BACKENDS:
        out = attention(*inputs, mask=mask, scale=scale, backend=backend)
        results[backend] = (out, *torch.autograd.grad(out.square().sum(), inputs))
    for backend in ("auto", "sdpa"):
        for got, expected in zip(results[backend], results["math"]):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_masked_keys_do_not_matter():
    q, k, v = (tensor.detach() for tensor in tensors())
    mask = masks()["keys"]
    changed = torch.where(mask[:, None, :, None], v, v + 100)
    for backend in BACKENDS:
        torch.testing.assert_close(attention(q, k, changed, mask, backend=backend), attention(q, k, v, mask))
    assert not torch.allclose(attention(q, k, changed), attention(q, k, v))


def test_math_gives_zeros_where_nothing_may_be_attended():
    mask = torch.zeros(2, 11, dtype=torch.bool)
    assert attention(*tensors(), mask=mask, backend="math").abs().max() == 0


def test_math_has_forward_and_second_derivatives():
    q, k, v = tensors()
    step = torch.randn_like(q)

    def gradient(a):
        return torch.autograd.grad(attention(a, k, v, backend="math").square().sum(), a, create_graph=True)[0]

    (second,) = torch.autograd.grad((gradient(q) * step).sum(), q)
    near = (gradient(q + 1e-2 * step) - gradient(q - 1e-2 * step)) / 2e-2
    torch.testing.assert_close(second, near, rtol=1e-2, atol=1e-3)
    _, tangent = torch.func.jvp(lambda a: attention(a, k, v, backend="math"), (q,), (step,))
    near = attention(q + 1e-2 * step, k, v) - attention(q - 1e-2 * step, k, v)
    torch.testing.assert_close(tangent, near / 2e-2, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["none", "broadcast", "full", "bias"])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("width", [5, 6])
def test_the_log_sum_exp_is_that_of_all_scores(kind, scale, width, monkeypatch):
    """Values of another width than the keys take the way of some queries at a time."""
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 2 * 3 * 11 * 2)  # two of seven queries
    q, k, v = (one.detach() for one in tensors())
    v = torch.randn(2, 3, 11, width)
    keep = masks().get(kind)
    bias = torch.randn(2, 1, 7, 11) if kind == "bias" else None
    scores = q @ k.transpose(-1, -2) * (scale or 5**-0.5) + (0 if bias is None else bias)
    scores = scores if keep is None else scores.masked_fill(~keep, -torch.inf)
    found = attention_with_lse(q, k, v, keep if bias is None else bias, scale)
    assert found.lse.dtype == torch.float32
    torch.testing.assert_close(found.lse, scores.logsumexp(-1))
    torch.testing.assert_close(found.out, scores.softmax(-1) @ v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_beside_the_log_sum_exp_has_the_bits_of_plain_attention(dtype):
    q, k, v = (one.detach().to(dtype) for one in tensors())
    keep = masks()["broadcast"]
    for mask in (None, keep):
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.equal(attention_with_lse(q, k, v, mask).out, plain)


def test_keeps_the_dtype():
    inputs = [tensor.detach().bfloat16() for tensor in tensors()]
    for backend in BACKENDS:
        assert attention(*inputs, backend=backend).dtype == torch.bfloat16


def test_refuses_bad_input():
    with pytest.raises(UserError, match="did you mean 'math'"):
        attention(*tensors(), backend="maths")
    with pytest.raises(ValueError, match="boolean"):
        attention(*tensors(), mask=torch.ones(2, 11))
    with pytest.raises(ValueError, match="shape"):
        attention(*tensors(), mask=torch.ones(11, dtype=torch.bool))
