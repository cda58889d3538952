"""Conditions as further channels: what is given stands beside the noisy latents at the model's input.

    v(x, t, c) = denoiser([x, c_1, c_2, ...], t),    every c_i (B, k_i, h, w) on the grid of x

The denoiser may be trained already: its input projection is widened by columns of zeros, so at first it draws as before
(`nn.widen`). A condition may have weights of its own, which are trained along.

- `InpaintChannels`: the latents of a picture whose hidden part was made grey before it was encoded, so that nothing
  leaks through the encoder, and the mask in [-1, 1]: 4 + 1 channels beside 4.
- `SemanticMapChannels`: a map of classes, one-hot, halved by averages as often as the encoder halves, then mixed into a
  few channels by a learned 1x1 convolution.

Source: LFM (arXiv 2307.08698), its conditional models; latent diffusion (arXiv 2112.10752), section 3.3, and the
rescaler of its code.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.data.masks import shrink_mask
from smalti.nn.widen import widen
from smalti.training.inpaint_source import EDIT_MASK, MASKED


class ChannelCondition(nn.Module, ABC):
    """Makes channels of tensors that stand in `cond.extra`."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """How many it makes."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the tensors that it reads."""

    @abstractmethod
    def forward(self, cond: Cond, size: Sequence[int]) -> Tensor:
        """Channels (B, k, h, w) for latents of size (h, w).

        Raises:
            UserError: a tensor is missing or does not fit.
        """


class InpaintChannels(ChannelCondition):
    """What is known of a picture: masked latents (B, C, h, w), and the mask (B, 1, H, W), 1 = to be generated.

    Args:
        latent_channels: C.
    """

    def __init__(self, latent_channels: int):
        super().__init__()
        self.latent_channels = latent_channels

    @property
    def channels(self) -> int:
        return self.latent_channels + 1

    @property
    def names(self) -> tuple[str, ...]:
        return (MASKED, EDIT_MASK)

    def forward(self, cond: Cond, size: Sequence[int]) -> Tensor:
        masked, mask = (given(cond, name) for name in self.names)
        if masked.shape[1:] != (self.latent_channels, *size):
            wanted = f"(B, {self.latent_channels}, {size[0]}, {size[1]})"
            raise UserError(f"got masked latents {tuple(masked.shape)}; they must be {wanted}")
        return torch.cat([masked, 2 * shrink_mask(mask, size) - 1], 1)


class SemanticMapChannels(ChannelCondition):
    """A map of classes (B, H, W) at the pixels, in whole numbers.

    Args:
        classes: K; numbers are below it.
        channels: that are made.
        halvings: from pixels to latents, 3 for a factor of 8.
    """

    def __init__(self, classes: int, channels: int = 4, halvings: int = 3):
        super().__init__()
        self.classes, self.halvings = classes, halvings
        self.mix = nn.Conv2d(classes, channels, 1)

    @property
    def channels(self) -> int:
        return self.mix.out_channels

    @property
    def names(self) -> tuple[str, ...]:
        return ("segments",)

    def forward(self, cond: Cond, size: Sequence[int]) -> Tensor:
        segments = given(cond, "segments").long()
        if segments.ndim != 3 or tuple(side // 2**self.halvings for side in segments.shape[1:]) != tuple(size):
            raise UserError(
                f"got segments {tuple(segments.shape)}; for latents of {tuple(size)} they must be "
                f"(B, {size[0] * 2**self.halvings}, {size[1] * 2**self.halvings})"
            )
        if segments.min() < 0 or segments.max() >= self.classes:
            raise UserError(f"a segment has the class {int(segments.max())}; classes go from 0 to {self.classes - 1}")
        shares = F.one_hot(segments, self.classes).movedim(-1, 1).to(self.mix.weight.dtype)
        for _ in range(self.halvings):
            shares = F.interpolate(shares, scale_factor=0.5, mode="bilinear", align_corners=False)
        return self.mix(shares)


class ChannelConcat(nn.Module):
    """A denoiser with conditions at its input: `(x, t, cond) -> velocity`.

    Args:
        denoiser: trained or new; its input projection is replaced by a wider one. A backbone of ours keeps the new
            shape in its configuration, so `save_pretrained` and `from_pretrained` serve it as before.
        conditions: at least one, in the order of their channels.
        projection: path of the input projection.

    Raises:
        UserError: there is no such projection, or no condition.

    Example:
        >>> model = ChannelConcat(dit, [InpaintChannels(4)])
        >>> model(x, t, Cond(label=label, extra=inpaint_extra(tokenizer, pixels, mask)))
    """

    def __init__(
        self, denoiser: nn.Module, conditions: Sequence[ChannelCondition], projection: str = "x_embedder"
    ):  # fmt: skip
        super().__init__()
        layer = dict(denoiser.named_modules()).get(projection)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or not conditions:
            raise UserError(
                f"got {len(conditions)} conditions for {type(denoiser).__name__}.{projection}; give at least one "
                "condition, and the path of the linear layer or convolution that reads the latents"
            )
        added = sum(one.channels for one in conditions)
        if isinstance(layer, nn.Linear):
            wide: nn.Module = widen(layer, added * denoiser.patch_size**2)  # type: ignore[operator]
            if "pruned" in getattr(denoiser, "config", {}):
                shapes = {**(denoiser.config["pruned"] or {}), projection: {"in": wide.in_features}}  # type: ignore[index]
                denoiser.register_to_config(pruned=shapes)  # type: ignore[operator]
        else:
            wide = widen(layer, added)
        denoiser.set_submodule(projection, wide)
        self.denoiser = denoiser
        self.conditions: nn.ModuleList = nn.ModuleList(conditions)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity (B, C, h, w) of latents of that shape.

        Raises:
            UserError: a condition's tensor is missing or does not fit.
        """
        channels = [one(cond, x.shape[-2:]).to(x.dtype) for one in self.conditions]
        used = {name for one in self.conditions for name in one.names}  # type: ignore[union-attr]
        rest = {name: value for name, value in cond.extra.items() if name not in used}
        return self.denoiser(torch.cat([x, *channels], 1), t, replace(cond, extra=rest))


def given(cond: Cond, name: str) -> Tensor:
    """A tensor of `cond.extra`; raises `UserError` if it is missing."""
    if name not in cond.extra:
        raise UserError(f"the model needs cond.extra[{name!r}]; got {', '.join(cond.extra) or 'nothing'} there")
    return cond.extra[name]
