"""RMS norm: `x / sqrt(mean(x^2) + eps) * weight` over the last dim, in float32 (arXiv 1910.07467, eq. 4)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """RMS norm of (..., D) with a learned weight (D,); computes in float32 and returns the dtype of its input.

    Args:
        width: D.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (normed * self.weight.float()).to(x.dtype)
