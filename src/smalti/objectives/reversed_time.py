"""Networks that learned with time the other way round, 0 = noise and 1 = data, as denoisers of ours.

With `tau = 1 - t` the path is the same and its velocity points at the data: `v(x, t) = -network(x, 1 - t)`. Wrapped in
this, such a network is trained by our objectives and sampled by our solvers; what it learns stays in its own dialect.

Source: both directions occur within the code of LFM (arXiv 2307.08698), whose script for inpainting swaps data and
noise; SiT (arXiv 2401.08740) has 0 = noise.
"""

from torch import Tensor, nn

from smalti.core.protocols import Cond
from smalti.core.time import reverse_time


class ReversedTime(nn.Module):
    """A denoiser `(x, t, cond) -> velocity` made of a network with `tau = 1 - t`.

    Args:
        network: `(x (B, ...), tau, cond) -> x0 - noise (B, ...)`.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity `noise - x0` (B, ...) at t, 0 = data."""
        return -self.network(x, reverse_time(t), cond)
