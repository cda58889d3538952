"""The feed-forward layer of a transformer: `W2 gelu(W1 x)`, GELU by its tanh formula (arXiv 1606.08415, section 2)."""

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Two linear layers about a GELU: (..., D) -> (..., D).

    Args:
        width: D.
        ratio: hidden width over D.
        bias_out: whether the second layer has a bias.
    """

    def __init__(self, width: int, ratio: float = 4.0, bias_out: bool = True):
        super().__init__()
        hidden = int(width * ratio)
        self.proj_in = nn.Linear(width, hidden)
        self.proj_out = nn.Linear(hidden, width, bias=bias_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))
