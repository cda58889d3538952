"""Given panels as an input of the model: the alternative to replacing them at every step.

Beside the noisy canvas the model sees the clean latents of the given panels and a mask, through further columns of its
first projection that start at zero, so that it begins as the plain model. Each sample draws which of its panels
are given, at times none; the loss counts what is to be drawn. In use no replacement is needed while drawing: the
model has learned to look at what is given.

Source: the fill models that In-Context LoRA (arXiv 2410.23775, section 3.4) names for conditional use; inputs as in
latent in-painting (arXiv 2112.10752, section 4.5), with columns that start at zero (arXiv 2211.09800, section 3.2).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Batch, Cond, Denoiser, Generators, LossResult, TrainState
from smalti.core.seeds import rand, randn
from smalti.core.time import interpolate
from smalti.nn.patchify import patchify
from smalti.objectives.time_sampling import LogitNormal, Shifted, TimeDistribution, sample_times
from smalti.ops.canvas import PanelLayout

GIVEN = "given panels"
"""In `cond.extra`: clean latents where given and else 0, with the mask as one more channel (B, C + 1, H, W)."""


def with_given(cond: Cond, x0: Tensor, mask: Tensor) -> Cond:
    """The conditions with what is given: clean latents (B, C, H, W) and a mask (B, 1, H, W), True = given."""
    mask = mask.expand(len(x0), 1, *x0.shape[2:]).to(x0.dtype)
    return replace(cond, extra={**cond.extra, GIVEN: torch.cat([x0 * mask, mask], 1)})


class FillModel(nn.Module):
    """A model that also sees given panels: `(x, t, cond) -> velocity`.

    Args:
        model: one of ours with a linear `x_embedder`; what of it learns is the caller's matter (all, an adapter).

    Raises:
        Refusal: it has none.
    """

    def __init__(self, model: Any):
        super().__init__()
        embedder = getattr(model, "x_embedder", None)
        if not isinstance(embedder, nn.Linear):
            raise Refusal(f"{type(model).__name__} has no linear x_embedder to widen; take a DiT or MMDiT")
        self.model, self.patch = model, int(model.config.get("patch_size", 1))
        channels = embedder.in_features // self.patch**2
        self.columns = nn.Linear((channels + 1) * self.patch**2, embedder.out_features, bias=False)
        nn.init.zeros_(self.columns.weight)
        self.to(embedder.weight.device)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity; without given panels in `cond.extra` that of the plain model."""
        given = cond.extra.get(GIVEN)
        if given is None:
            return self.model(x, t, cond)
        tokens = self.columns(patchify(given, self.patch).to(self.columns.weight.dtype))
        handle = self.model.x_embedder.register_forward_hook(lambda module, args, out: out + tokens)
        try:
            return self.model(x, t, cond)
        finally:
            handle.remove()


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
