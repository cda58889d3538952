"""Scaled dot-product attention: one call, several backends.

`softmax(q k^T * scale + mask) v` over the last two dims (arXiv 1706.03762, eq. 1). Backend `sdpa` is PyTorch's fused
kernel; `math` is the plain reference in float32, which also supports double backward and forward-mode derivatives.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.core.errors import unknown_name

BACKENDS = ("auto", "math", "sdpa")


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
