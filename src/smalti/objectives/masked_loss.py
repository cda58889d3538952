"""Losses of a denoiser that sees only some of the tokens: the error is taken where it looked, sample by sample.

    loss_b = sum_n kept_bn * error_bn / sum_n kept_bn,   error_bn the mean over the values of patch n

The places that were dropped say nothing, so neither their zeros nor their number may enter. Without a mask this is
plain flow matching, bit for bit. MaskDiT's baseline also has the dropped patches of the noisy sample painted from the
kept ones, with a small weight.

Source: MicroDiT (arXiv 2407.15811), section 3.1, there for EDM (see `edm`); the reconstruction of dropped patches,
MaskDiT (arXiv 2306.09305), equation 4. MaskDiT measures it on the preconditioned estimate, which holds the noisy sample
itself; here it is measured on what the network gives.
"""

from dataclasses import dataclass, field, replace

from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, Denoiser, Generators, LossResult, TrainState
from smalti.core.seeds import randn
from smalti.core.time import interpolate
from smalti.nn.patchify import patchify
from smalti.objectives.time_sampling import LogitNormal, Shifted, TimeDistribution, check_shift, sample_times
from smalti.ops.token_masks import KEEP, Kept, RandomMask, TokenMask
from smalti.ops.token_subset import gather


@dataclass(frozen=True)
class MaskedFlowMatching:
    """Flow matching on the patches that a mask keeps; the denoiser finds their places in `cond.extra["keep"]`.

    Args:
        mask: which patches stay.
        patch_size: P of the denoiser.
        time: distribution of the training times.
        shift: moves the times towards noise (above 1) or data (below 1).
        reconstruction: weight of painting the dropped patches of the noisy sample, as MaskDiT does (0.1); 0 = none.

    Example:
        >>> objective = MaskedFlowMatching(RandomMask(0.75), patch_size=2)
    """

    mask: TokenMask = field(default_factory=RandomMask)
    patch_size: int = 1
    time: TimeDistribution = field(default_factory=LogitNormal)
    shift: float = 1.0
    reconstruction: float = 0.0

    def __post_init__(self):
        check_shift(self.shift)
        if self.reconstruction < 0:
            raise UserError(f"reconstruction has weight {self.reconstruction}; choose one from 0 (none)")

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """Mean over the samples of their errors over kept patches; time, noise and mask come from the generators."""
        x0 = batch.x0.float()
        t = sample_times(Shifted(self.time, self.shift), generator, batch.ids).to(x0.device)
        noise = randn(x0.shape, generator, x0.device)
        xt = interpolate(x0, noise, t)
        kept = draw_mask(self.mask, x0, self.patch_size, generator)
        velocity = denoiser(xt.to(batch.x0.dtype), t, with_mask(batch.cond, kept)).float()
        loss = sample_errors(velocity - (noise - x0), kept, self.patch_size).mean()
        if kept is None or not self.reconstruction:
            return LossResult(loss)
        painted = mean_over(velocity - xt, kept.drop, self.patch_size).mean()
        return LossResult(loss + self.reconstruction * painted, {"reconstruction": painted.detach()})


def draw_mask(mask: TokenMask, x: Tensor, patch: int, generator: Generators) -> Kept | None:
    """Masks for the patches of x (B, C, H, W), on its device."""
    kept = mask.draw(x.shape[-2] // patch, x.shape[-1] // patch, len(x), generator)
    return None if kept is None else Kept(kept.keep.to(x.device), kept.drop.to(x.device))


def with_mask(cond: Cond, kept: Kept | None) -> Cond:
    """The conditioning with the kept places for a denoiser that masks; itself without a mask."""
    return cond if kept is None else replace(cond, extra={**cond.extra, KEEP: kept.keep})


def sample_errors(difference: Tensor, kept: Kept | None, patch: int) -> Tensor:
    """Mean squared differences (B,) of (B, C, H, W), over kept patches, or over all without a mask."""
    if kept is None:
        return difference.square().flatten(1).mean(1)
    return mean_over(difference, kept.keep, patch)


def mean_over(difference: Tensor, places: Tensor, patch: int) -> Tensor:
    """Mean squared differences (B,) over the patches at `places` (B, n): the denominator is n, not N."""
    return gather(patchify(difference, patch), places).square().flatten(1).mean(1)
