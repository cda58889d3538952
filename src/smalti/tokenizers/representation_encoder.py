"""A frozen vision encoder whose patch tokens are latents: pixels to a grid of features of equal loudness.

Pictures are resized to the encoder's own number of patches and normalised by its colours; class token and registers
are cut off (`vision_encoder.FeatureTeacher`). The last layer norm goes without its weights and bias, so that every
token has mean 0 and variance 1 over its channels: then one scale of noise means the same at every place.

Source: RAE (arXiv 2510.11690), section 3.1 and its appendix on the encoders.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.tokenizers.vision_encoder import FeatureTeacher


class RepresentationEncoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> features (B, C, rows, columns), frozen.

    Args:
        teacher: a frozen encoder, which is copied.

    Raises:
        UserError: what the encoder gives does not come from a layer norm.
    """

    def __init__(self, teacher: FeatureTeacher):
        super().__init__()
        self.teacher = copy.deepcopy(teacher)
        norm = last_norm(self.teacher)
        if norm.elementwise_affine:
            norm.weight.data.fill_(1.0)
            if norm.bias is not None:
                norm.bias.data.fill_(0.0)

    @property
    def dim(self) -> int:
        """C."""
        return self.teacher.dim

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        rows, columns = self.teacher.grid(*pixels.shape[-2:])
        return self.teacher(pixels).mT.unflatten(2, (rows, columns))


@torch.no_grad()
def last_norm(teacher: FeatureTeacher) -> nn.LayerNorm:
    """The layer norm whose output is what the encoder gives, found by watching one call.

    Raises:
        UserError: there is none.
    """
    seen: list[tuple[nn.LayerNorm, Tensor]] = []

    def watch(norm: nn.LayerNorm) -> Any:
        def note(module: nn.Module, given: Any, output: Any) -> None:
            seen.append((norm, output))

        return norm.register_forward_hook(note)

    hooks = [watch(module) for module in teacher.modules() if isinstance(module, nn.LayerNorm)]
    rows, columns = teacher.tokens or (2, 2)
    size = (rows * teacher.patch_size, columns * teacher.patch_size)
    pixels: Any = torch.linspace(-1, 1, 3 * size[0] * size[1]).view(1, 3, *size)
    try:
        tokens = teacher(pixels.to(teacher.mean.device))
    finally:
        for hook in hooks:
            hook.remove()
    for norm, output in reversed(seen):
        if output.shape[-1] == teacher.dim and torch.equal(output[:, -tokens.shape[1] :].float(), tokens):
            return norm
    raise UserError("this encoder ends without a layer norm, whose weights would have to go; choose another encoder")
