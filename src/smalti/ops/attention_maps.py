"""Attention maps as distributions: logits of queries and keys, maps on another grid, how far two sets are apart.

With logits `S = q k^T / sqrt(d)`, a map `P = softmax(S)` gives each query a distribution over the keys. The distance of
a student's maps from a teacher's is their cross-entropy

    L = mean over samples, heads and queries of  - sum_k P[k] log Q[k],     P of the teacher, Q of the student,

which is at least the mean entropy of P. Of h_s and h_t heads the first min(h_s, h_t) are compared.

Source: HASTE (arXiv 2505.16792), section 3, attention alignment. B samples, h heads, N queries and keys on one grid.
"""

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.ops.token_grid import resize_tokens


def attention_logits(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """What a softmax over keys sees: scaled products (B, h, N, M) in float32, under autocast too.

    Args:
        q: queries (B, h, N, d), normed and rotated if the model does so.
        k: keys (B, h, M, d).
        scale: factor on the products; None is 1 / sqrt(d).
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() * factor) @ k.float().mT


def teacher_maps(
    logits: Tensor, prefix: int = 0, grid: tuple[int, int] | None = None, new_grid: tuple[int, int] | None = None
) -> Tensor:
    """Distributions of patches over patches (B, h, N, N).

    Args:
        logits: of all tokens (B, h, prefix + T, prefix + T).
        prefix: how many tokens (class token, registers) stand before the patches; they are dropped before the softmax.
        grid: rows and columns of the T patches; None = they are not resized.
        new_grid: rows and columns of N. Queries and keys are resized, then each row sums to 1 again.
    """
    maps = logits[..., prefix:, prefix:].float().softmax(-1)
    if grid is None or new_grid is None or grid == new_grid:
        return maps
    batch, heads = maps.shape[:2]
    keys = resize_tokens(maps.flatten(0, 1).mT, grid, new_grid).mT  # (B*h, T, N)
    both = resize_tokens(keys, grid, new_grid).unflatten(0, (batch, heads))  # (B, h, N, N)
    return both / both.sum(-1, keepdim=True)


def attention_cross_entropy(logits: Tensor, maps: Tensor) -> Tensor:
    """The distance of a student's maps from a teacher's (), in nats.

    Args:
        logits: of the student (B, h_s, N, N).
        maps: of the teacher (B, h_t, N, N), rows that sum to 1.

    Raises:
        UserError: samples or tokens differ.
    """
    if logits.shape[0] != maps.shape[0] or logits.shape[2:] != maps.shape[2:]:
        raise UserError(
            f"attention of shape {tuple(logits.shape)} cannot be compared with maps of shape {tuple(maps.shape)}; "
            "samples and tokens must be as many"
        )
    heads = min(logits.shape[1], maps.shape[1])
    return -(maps[:, :heads] * logits[:, :heads].float().log_softmax(-1)).sum(-1).mean()


def attention_entropy(maps: Tensor) -> Tensor:
    """Mean entropy of maps (B, h, N, N) in nats: the least that their cross-entropy can be."""
    return torch.special.entr(maps.float()).sum(-1).mean()
