"""Given panels as an input of the model: the alternative to replacing them at every step.

Beside the noisy canvas the model sees the clean latents of the given panels and a mask, as further channels
(`control.channel_concat`) that count for nothing at first. Each sample draws which of its panels
are given, at times none; the loss counts what is to be drawn. In use no replacement is needed while drawing: the
model has learned to look at what is given.

Source: the fill models that In-Context LoRA (arXiv 2410.23775, section 3.4) names for conditional use; inputs as in
latent in-painting (arXiv 2112.10752, section 4.5), with columns that start at zero (arXiv 2211.09800, section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from smalti.control.channel_concat import ChannelCondition, given
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, Denoiser, Generators, LossResult, TrainState
from smalti.core.seeds import rand, randn
from smalti.core.time import interpolate
from smalti.objectives.time_sampling import LogitNormal, Shifted, TimeDistribution, sample_times
from smalti.ops.canvas import PanelLayout

GIVEN = "given panels"
"""In `cond.extra`: clean latents where given and else 0, with the mask as one more channel (B, C + 1, H, W)."""


def with_given(cond: Cond, x0: Tensor, mask: Tensor) -> Cond:
    """The conditions with what is given: clean latents (B, C, H, W) and a mask (B, 1, H, W), True = given."""
    mask = mask.expand(len(x0), 1, *x0.shape[2:]).to(x0.dtype)
    return replace(cond, extra={**cond.extra, GIVEN: torch.cat([x0 * mask, mask], 1)})


class PanelChannels(ChannelCondition):
    """What is given of a canvas, as channels of the model's input.

    Args:
        latent_channels: C.

    Example:
        >>> model = ChannelConcat(mmdit, [PanelChannels(16)])
    """

    def __init__(self, latent_channels: int):
        super().__init__()
        self.latent_channels = latent_channels

    @property
    def channels(self) -> int:
        return self.latent_channels + 1

    @property
    def names(self) -> tuple[str, ...]:
        return (GIVEN,)

    def forward(self, cond: Cond, size: Sequence[int]) -> Tensor:
        panels = given(cond, GIVEN)
        if panels.shape[1:] != (self.channels, *size):
            raise UserError(
                f"got given panels {tuple(panels.shape)}; they must be (B, {self.channels}, {size[0]}, {size[1]}), "
                "as with_given makes them"
            )
        return panels


@dataclass(frozen=True)
class FillPanels:
    """Flow matching with given panels.

    Args:
        layout: of the canvases.
        none_given: how often no panel is given; else their number is drawn evenly from 1 to P - 1.
        time: distribution of the training times.
        shift: of the times towards noise.
    """

    layout: PanelLayout
    none_given: float = 0.1
    time: TimeDistribution = field(default_factory=LogitNormal)
    shift: float = 1.0

    def __post_init__(self):
        if not 0 <= self.none_given <= 1:
            raise UserError(f"got none_given={self.none_given}; choose a share in [0, 1]")

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """The mean squared error over what is to be drawn."""
        x0 = batch.x0.float()
        mask = self.masks(x0, generator)
        t = sample_times(Shifted(self.time, self.shift), generator, batch.ids, 1).to(x0.device)
        noise = randn(x0.shape, generator, x0.device)
        velocity = denoiser(interpolate(x0, noise, t), t, with_given(batch.cond, x0, mask))
        drawn = (~mask).expand_as(x0)
        return LossResult((velocity.float() - (noise - x0)).square()[drawn].mean())

    def masks(self, x0: Tensor, generator: Generators) -> Tensor:
        """Which panels are given, (B, 1, H, W) bool; every sample by its own generator."""
        count = self.layout.count
        draw = rand((len(x0), 2 + count), generator)
        number = 1 + (draw[:, 1] * (count - 1)).long()
        number = torch.where(draw[:, 0] < self.none_given, 0, number)
        order = draw[:, 2:].argsort(1)
        masks = [
            self.layout.mask(row[:some].tolist(), *x0.shape[-2:]) for row, some in zip(order, number.tolist())
        ]  # fmt: skip
        return torch.stack(masks)[:, None].to(x0.device)
