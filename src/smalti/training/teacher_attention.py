"""What a vision transformer sees and where it looks: patch tokens after the last norm, and attention maps by block.

Maps come from the model's own queries and keys, whoever wrote the model (ours, the transformers library, timm): its
blocks are its longest list of modules, and each calls the attention function once. What precedes the patches (class
token, registers) is dropped before the softmax.

Source: HASTE (arXiv 2505.16792), section 3: the teacher's side of both alignments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smalti.core.errors import Refusal, UserError
from smalti.core.method import Site
from smalti.ops.attention_maps import teacher_maps
from smalti.seams.anatomy import Sublayer
from smalti.seams.attention_watch import AttentionWatch
from smalti.seams.taps import ImageAttention
from smalti.tokenizers.vision_encoder import FeatureTeacher


@dataclass(frozen=True)
class View:
    """Of pictures, as a teacher saw them.

    Args:
        tokens: of patches (B, T, D) after the last norm, float32.
        grid: their rows and columns.
        attention: queries and keys of all tokens, by block from 1; their products exist only while they are used.
        prefix: how many tokens stand before the patches.
    """

    tokens: Tensor
    grid: tuple[int, int]
    attention: dict[int, ImageAttention]
    prefix: int

    def maps(self, block: int, grid: tuple[int, int]) -> Tensor:
        """Distributions of patches over patches (B, h, N, N) in a block, on a grid of rows and columns."""
        return teacher_maps(self.attention[block].logits(), self.prefix, self.grid, grid)


class AttentionTeacher:
    """A frozen teacher whose attention can be seen; no module, so it is neither trained nor saved.

    Args:
        teacher: any; its hooks are there while a picture is looked at.
        blocks: whose logits are wanted, from 1.

    Raises:
        UserError: it has no such block.

    Example:
        >>> teacher = AttentionTeacher(load_teacher("random", tokens=(4, 4)), [5, 6])
        >>> teacher(torch.zeros(2, 3, 64, 64)).maps(5, (4, 4)).shape
        torch.Size([2, 6, 16, 16])
    """

    def __init__(self, teacher: FeatureTeacher, blocks: Sequence[int]):
        stacks = [one for one in teacher.modules() if isinstance(one, nn.ModuleList)]
        stack = max(stacks, key=len, default=[])
        for block in blocks:
            if not 1 <= block <= len(stack):
                raise UserError(f"got block {block} of the teacher, which has blocks 1 to {len(stack)}")
        self.teacher = teacher
        self._blocks = {
            block: Sublayer(Site("blocks", block - 1, "", "attention", block - 1), stack[block - 1]) for block in blocks
        }

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> View:
        """Looks at pictures (B, 3, H, W) in [-1, 1].

        Raises:
            Refusal: a block does not call PyTorch's attention function once.
        """
        if self.teacher.mean.device != pixels.device:
            self.teacher.to(pixels.device)
        watch = AttentionWatch(self.teacher, self._blocks.values())
        watch.begin()
        try:
            tokens = self.teacher(pixels)
        finally:
            watch.remove()
        seen = {}
        for block, sublayer in self._blocks.items():
            calls = watch.calls.get(sublayer.site, [])
            if len(calls) != 1:
                raise Refusal(
                    f"block {block} of the teacher called scaled_dot_product_attention {len(calls)} times, not once; "
                    'load it with attn_implementation="sdpa" (timm: fused attention on), or choose another teacher'
                )
            seen[block] = ImageAttention(calls[0].q, calls[0].k, calls[0].scale)
        prefix = next((one.k.shape[2] - tokens.shape[1] for one in seen.values()), 0)
        return View(tokens, self.teacher.grid(*pixels.shape[-2:]), seen, prefix)
