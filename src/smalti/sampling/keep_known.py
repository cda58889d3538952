"""Keeps what is known of a picture while the rest of it is drawn.

After every step the known places are put back at the noise level of its time, `(1 - s) * known + s * noise`, always
with the same noise, so that they move along their own straight path; at s = 0 they are what was given. A model that
never saw a mask then fills the rest, with what little of the surroundings each step lets in. `paste` does it once.

Source: RePaint (arXiv 2201.09865), equation 8, without its repeats; at a fixed noise on the path of flow matching.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.time import interpolate
from smalti.sampling.loop import SampleStep


def paste(drawn: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """`drawn` (B, C, H, W) where the mask (B, 1, H, W) is 1, and exactly `known` where it is 0.

    Raises:
        UserError: the shapes do not fit, or the mask has values between 0 and 1.
    """
    if drawn.shape != known.shape or mask.shape[-2:] != drawn.shape[-2:]:
        raise UserError(
            f"got pictures {tuple(drawn.shape)} and {tuple(known.shape)} with a mask {tuple(mask.shape)}; "
            "give equal shapes and a mask of the same size"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError("the mask has values other than 0 (given) and 1 (to be generated); round it first")
    return torch.where(mask.bool(), drawn, known)


@dataclass(frozen=True)
class KeepKnown:
    """A callback of `sample`.

    Args:
        known: what is given (B, C, H, W), a clean sample.
        noise: of the start (B, C, H, W).
        mask: (B, 1, H, W), 1 = to be generated.

    Example:
        >>> sample(model, noise, schedule, Euler(), callback=KeepKnown(known, noise, mask)).x
    """

    known: Tensor
    noise: Tensor
    mask: Tensor

    def __call__(self, step: SampleStep) -> Tensor:
        """The sample after a step with the known places put back."""
        times = torch.full((len(self.known),), step.s, device=self.known.device, dtype=self.known.dtype)
        return paste(step.x, interpolate(self.known, self.noise, times), self.mask)
