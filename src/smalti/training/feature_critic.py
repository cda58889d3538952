"""A critic that sees pictures through a frozen vision encoder: small heads on the tokens of some of its blocks.

    scores = head_i(tokens after block i),     one score a token and head

The encoder knows what pictures show and cannot be fooled by noise; the heads alone learn. Each is a linear layer, a
convolution along the tokens that is added to what it reads, and a last layer to one score, with norms over groups of
channels and spectral norms on all weights. Gradients pass the encoder to the pixels.

Source: StyleGAN-T (arXiv 2301.09515), section 3.1, figure 3, and VAR's tokenizer, whose critic RAE (arXiv 2510.11690)
takes for its decoder. GroupNorm stands in place of batch norm, so that a score does not depend on its batch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from smalti.core.errors import UserError
from smalti.tokenizers.vision_encoder import FeatureTeacher

KERNEL = 9
GROUPS = 8


class FeatureCritic(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> scores (B, heads * T), high for what looks real.

    Args:
        teacher: the frozen encoder, of T tokens; it is neither trained nor saved.
        depths: blocks that are read, from 1; None = four, evenly spaced.

    Raises:
        UserError: the encoder has no such block.
    """

    def __init__(self, teacher: FeatureTeacher, depths: Sequence[int] | None = None):
        super().__init__()
        self._teacher = [teacher]  # unregistered
        self._blocks = [longest_stack(teacher)]
        count = len(self._blocks[0])
        self.depths = tuple(depths) if depths is not None else even_depths(count)
        if not self.depths or not all(1 <= depth <= count for depth in self.depths):
            raise UserError(f"got depths {self.depths} of an encoder of {count} blocks; give numbers from 1 to {count}")
        self.heads = nn.ModuleList(_Head(teacher.dim) for _ in self.depths)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([head(one.mT) for head, one in zip(self.heads, self.tokens(pixels))], dim=1)

    def tokens(self, pixels: Tensor) -> list[Tensor]:
        """Patch tokens (B, T, D) after each chosen block, through which gradients pass to the pixels."""
        teacher, found = self._teacher[0].to(pixels.device), {}
        hooks = [
            self._blocks[0][depth - 1].register_forward_hook(
                lambda _, __, output, depth=depth: found.update({depth: output})
            )
            for depth in self.depths
        ]
        try:
            last = teacher.features(teacher.preprocess(pixels))
        finally:
            for hook in hooks:
                hook.remove()
        outputs = (found[depth] for depth in self.depths)
        whole = (output[0] if isinstance(output, tuple) else output for output in outputs)
        return [one[:, -last.shape[1] :].float() for one in whole]  # without class token and registers


class _Head(nn.Module):
    """Tokens (B, D, T) -> scores (B, T)."""

    def __init__(self, width: int):
        super().__init__()
        self.enter = nn.Sequential(spectral_norm(nn.Conv1d(width, width, 1)), _norm(width), nn.LeakyReLU(0.2))
        around = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, padding_mode="circular")
        self.around = nn.Sequential(spectral_norm(around), _norm(width), nn.LeakyReLU(0.2))
        self.leave = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.enter(tokens)
        return self.leave((self.around(tokens) + tokens) / math.sqrt(2)).squeeze(1)


def longest_stack(teacher: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The blocks of an encoder: the longest list of modules of one class.

    Raises:
        UserError: there is none.
    """
    lists = [one for one in teacher.modules() if isinstance(one, nn.ModuleList | nn.Sequential)]
    stacks = [one for one in lists if len(one) and len({type(block) for block in one}) == 1]
    if not stacks:
        raise UserError(f"{type(teacher).__name__} has no stack of blocks whose tokens a critic could read")
    return max(stacks, key=len)


def even_depths(count: int, wanted: int = 4) -> tuple[int, ...]:
    """So many blocks, evenly spaced, the last among them.

    Example:
        >>> even_depths(12)
        (3, 6, 9, 12)
    """
    return tuple(sorted({max(1, round(count * (index + 1) / wanted)) for index in range(wanted)}))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(GROUPS, width), width)
