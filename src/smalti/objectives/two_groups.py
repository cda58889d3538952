"""Experimental: flow matching with two times in a sample, each for a random group of its tokens.

    x_i = (1 - t_i) x0_i + t_i noise_i,   t_i = t' or t'' by the group of token i
    loss = mean |v(x, t) - (noise - x0)|^2

The denoiser takes a time for each token (B, N); `cond.extra["groups"]` tells the groups, so that attention can keep
them apart (`seams.group_watch`). `LesserPairs` gives an average the whole sample at a time before both.

Source: the extension in SRA's code (vvvvvjdy/SRA), described there without a paper; our reading of it.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Denoiser, Generators, LossResult, TrainState
from smalti.core.seeds import rand, randn
from smalti.objectives.paired_noise import Earlier
from smalti.objectives.time_sampling import LogitNormal, TimeDistribution, sample_times

GROUPS = "groups"
"""Name of the groups (B, N), bool, among the conditions."""


@dataclass(frozen=True)
class TwoGroupFlowMatching:
    """The objective.

    Args:
        patch_size: side of a token in latents.
        share: of the tokens in the first group, on average, in (0, 1).
        time: distribution of both times.
    """

    patch_size: int = 2
    share: float = 0.5
    time: TimeDistribution = field(default_factory=LogitNormal)

    def __post_init__(self):
        if self.patch_size < 1 or not 0 < self.share < 1:
            raise UserError(f"got {self}; patch_size is at least 1, share above 0 and below 1")

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """Mean over the batch of x0 (B, C, H, W); the denoiser is called once, with t (B, N)."""
        x0, device = batch.x0.float(), batch.x0.device
        one, other = (sample_times(self.time, generator, batch.ids).to(device) for _ in range(2))
        count = (x0.shape[-2] // self.patch_size) * (x0.shape[-1] // self.patch_size)
        groups = rand((len(x0), count), generator).to(device) < self.share
        t, noise = torch.where(groups, one[:, None], other[:, None]), randn(x0.shape, generator, device)
        at = token_map(t, x0, self.patch_size)
        cond = replace(batch.cond, extra={**batch.cond.extra, GROUPS: groups})
        velocity = denoiser(((1 - at) * x0 + at * noise).to(batch.x0.dtype), t, cond).float()
        return LossResult((velocity - (noise - x0)).square().mean())


@dataclass(frozen=True)
class LesserPairs:
    """For an average: all tokens at one time, at most `largest` before the lesser of a sample's times.

    Args:
        patch_size: side of a token in latents.
        largest: in [0, 1].
    """

    patch_size: int = 2
    largest: float = 0.0

    def draw(self, x0: Tensor, x: Tensor, t: Tensor, generator: Generators) -> Earlier:
        """As `StraightPairs.draw`, for t (B, N); the new times are (B,)."""
        s = (t.amin(1) - self.largest * rand((len(t),), generator).to(t.device)).clamp(0, 1)
        return Earlier(x0 + token_map(s[:, None] / t, x0, self.patch_size) * (x - x0), s)


def token_map(values: Tensor, like: Tensor, patch_size: int) -> Tensor:
    """Numbers of tokens (B, N) spread over their patches: (B, 1, H, W) for latents (B, C, H, W)."""
    rows, columns = like.shape[-2] // patch_size, like.shape[-1] // patch_size
    cells = values.unflatten(1, (1, rows, columns))
    return cells.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
