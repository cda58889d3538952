"""The gated feed-forward layer `W2 (silu(Wg x) * (W1 x))` without biases (arXiv 2002.05202, equation 6).

With three matrices in place of two, the hidden width is 2/3 of what the ratio says, so that parameters stay equal
(section 2 there); it is rounded up to a multiple that suits the hardware.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """A gated feed-forward layer: (..., D) -> (..., D).

    Args:
        width: D.
        ratio: hidden width over D, before the 2/3.
        multiple: the hidden width is a multiple of it.
    """

    def __init__(self, width: int, ratio: float = 4.0, multiple: int = 256):
        super().__init__()
        hidden = max(1, -(-int(width * ratio * 2 / 3) // multiple)) * multiple
        self.proj_in = nn.Linear(width, 2 * hidden, bias=False)  # gate and value, fused
        self.proj_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(F.silu(gate) * value)
