"""Scaled dot-product attention: one call, several backends.

`softmax(q k^T * scale + mask) v` over the last two dims (arXiv 1706.03762, eq. 1). Backend `sdpa` is PyTorch's fused
kernel; `math` is the plain reference in float32, which also supports double backward and forward-mode derivatives.
`attention_with_lse` gives the log of the sum of exponentials, too: fused kernels compute it anyway.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.core.errors import unknown_name
from smalti.ops.lse_merge import Partial

BACKENDS = ("auto", "math", "sdpa")
SCORES_AT_ONCE = 2**26
"""Scores that `attention_with_lse` holds where no fused kernel serves it: 256 MiB."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attends from q to k and v.

    Args:
        q: queries (B, h, N, d).
        k: keys (B, h, M, d).
        v: values (B, h, M, d).
        mask: bool, True = attend; (B, M), (B, 1, 1, M) or (B, h, N, M). A query that may attend to nothing gives zeros
            with `math`; do not build such rows for `sdpa`.
        scale: factor on the scores; None is 1 / sqrt(d).
        backend: `sdpa`, `math`, or `auto`, which is `sdpa`.

    Returns:
        (B, h, N, d) in the dtype of q.

    Raises:
        UserError: the backend is unknown.
        ValueError: the mask is not boolean or has another shape.
    """
    if backend not in BACKENDS:
        raise unknown_name("attention backend", backend, BACKENDS)
    mask = _check_mask(mask)
    if backend == "math":
        return _attention_math(q, k, v, mask, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Partial:
    """Attention and the log-sum-exp of its scaled scores.

    Never holds all scores: PyTorch's flash kernels return the log-sum-exp (on a CPU always; on a GPU in half precision
    without a mask); elsewhere some queries at a time, in float32.

    Args:
        q: queries (B, h, N, d).
        k, v: keys and values (B, h, M, d).
        mask: bool, True = attend, or an additive bias, broadcast to (B, h, N, M).
        scale: factor on the scores; None is 1 / sqrt(d).

    Returns:
        out (B, h, N, d) in the dtype of q, the same bits as `scaled_dot_product_attention` where a kernel serves it,
        and lse (B, h, N) in float32.
    """
    bias = mask
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
        return Partial(out, lse.float())
    if q.is_cuda and bias is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
        return Partial(out, lse.float())
    return _in_rows(q, k, v, bias, scale)


def _in_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Partial:
    """`attention_with_lse` in plain products, some queries at a time."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    rows = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    keys, values, parts = k.float().transpose(-1, -2), v.float(), []
    for start in range(0, q.shape[2], rows):
        scores = (q[:, :, start : start + rows].float() * factor) @ keys  # (B, h, rows, M)
        if bias is not None:
            scores = scores + (bias if bias.shape[-2] == 1 else bias[..., start : start + rows, :])
        parts.append((scores.softmax(-1) @ values, scores.logsumexp(-1)))
    outs, lses = zip(*parts, strict=True)
    return Partial(torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2))


def _check_mask(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"an attention mask is boolean with True = attend, got {mask.dtype}")
    if mask.ndim not in (2, 4):
        raise ValueError(f"an attention mask is (B, M), (B, 1, 1, M) or (B, h, N, M), got shape {tuple(mask.shape)}")
    return mask[:, None, None, :] if mask.ndim == 2 else mask


def _attention_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.float() * factor) @ k.float().transpose(-1, -2)  # (B, h, N, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights * mask
    return (weights @ v.float()).to(q.dtype)
