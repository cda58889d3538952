"""Exponential moving average of the weights: `shadow = d * shadow + (1 - d) * weight`, in float32.

The decay ramps up with the number n of updates, `d = min(decay, (1 + n) / (10 + n))`, so that the early average forgets
the random start. Source: arXiv 1912.04958 (EMA of the generator) for the use; the ramp is the one that TensorFlow's
`ExponentialMovingAverage(num_updates=...)` made common.
"""

import copy

import torch
from torch import Tensor, nn

from smalti.training.sharding import local


class EMA:
    """An averaged copy of a model, always ready to be called.

    Args:
        model: the model to follow; it is copied, in evaluation mode and without gradients. From the first update on
            its parameters must stay the same objects; by then both may have been cut into the same pieces.
        decay: of the average, in [0, 1); 0 follows the weights exactly.
        updates: how many updates the average has already seen.
    """

    def __init__(self, model: nn.Module, decay: float, updates: int = 0):
        self.decay, self.updates = decay, updates
        self.followed = model
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._shadow: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the followed model's weights; buffers are copied."""
        if not self._shadow:
            # Walking through the modules of a small model takes longer than averaging it: once is enough.
            self._shadow = [local(one) for one in self.model.parameters()]
            self._weights = [local(one) for one in self.followed.parameters()]
            self._buffers = list(zip(self.model.buffers(), self.followed.buffers(), strict=True))
        ramp = (1 + self.updates) / (10 + self.updates)
        weights = [w if w.dtype == s.dtype else w.to(s.dtype) for w, s in zip(self._weights, self._shadow)]
        torch._foreach_lerp_(self._shadow, weights, 1 - min(self.decay, ramp))
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Writes the averaged weights into a model of the same architecture."""
        for theirs, mine in zip(model.parameters(), self.model.parameters(), strict=True):
            theirs.copy_(mine)
        for theirs, mine in zip(model.buffers(), self.model.buffers(), strict=True):
            theirs.copy_(mine)
