"""Linear attention: scores that factor, so that keys and values are summed once for all queries.

    out_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j)),   phi(x) = elu(x) + 1

Source: Transformers are RNNs (arXiv 2006.16236), equations 4 to 7.
"""

import torch
from torch import Tensor
from torch.nn.functional import elu


def linear_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attends from q to k and v at a cost that is linear in their lengths.

    Args:
        q: queries (B, h, N, d).
        k, v: keys and values (B, h, M, d).
        mask: keys that count (B or 1, 1, 1, M), bool or an additive bias of 0 and minus infinity; None = all.

    Returns:
        (B, h, N, d) in the dtype of q; computed in float32.
    """
    features, keys = elu(q.float()) + 1, elu(k.float()) + 1
    if mask is not None:
        keys = keys * (mask if mask.dtype == torch.bool else mask.exp()).transpose(-1, -2)
    total = keys.transpose(-1, -2) @ v.float()  # (B, h, d, d)
    norm = features @ keys.sum(2)[..., None]  # (B, h, N, 1)
    return (features @ total / norm.clamp_min(1e-6)).to(q.dtype)
