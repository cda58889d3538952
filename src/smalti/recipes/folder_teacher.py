"""A teacher for the folder recipe: its features of the pictures, and the term that draws hidden states to them (REPA).

Source: Representation Alignment for Generation (arXiv 2410.06940): a third of the way through the blocks, weight 0.5.
"""

import torch
from torch import Tensor, nn

from smalti.seams.anatomy import read_anatomy
from smalti.tokenizers.vision_backends import load_teacher
from smalti.tokenizers.vision_encoder import FeatureTeacher
from smalti.training.repa import REPA, REPASettings, TeacherPort
from smalti.zoo.loader import weights_hash

FEATURES = "teacher"
"""Name of the features in a batch."""


class Teacher:
    """Pixels (B, 3, H, W) in [-1, 1] -> features (B, N, Dz), one for each token of the transformer.

    Args:
        name: that `load_teacher` knows.
        cell: side of a token in pixels.
        device: where it runs.
    """

    def __init__(self, name: str, cell: int, device: torch.device):
        self.name, self.cell, self.device = name, cell, device
        self._known: dict[tuple[int, int], FeatureTeacher] = {}
        first = self._on((1, 1))
        self.width, self.key = first.dim, ("teacher", name, weights_hash(first), cell)

    def __call__(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        with torch.no_grad():
            return self._on((height // self.cell, width // self.cell))(pixels.to(self.device)).cpu()

    def _on(self, grid: tuple[int, int]) -> FeatureTeacher:
        """The encoder for this many rows and columns of tokens."""
        if grid not in self._known:
            self._known[grid] = load_teacher(self.name, grid).to(self.device)
        return self._known[grid]

    def term(self, model: nn.Module, width: int) -> REPA:
        """The alignment of a transformer of this width."""
        depth = max(1, len(read_anatomy(model).blocks) // 3)
        return REPA(width, [TeacherPort(FEATURES, self.width)], REPASettings(depth, hidden=4 * width))
