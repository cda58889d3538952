"""DiffScaler: every layer of a frozen diffusion transformer gets a scale, a shift and a small ReLU branch for a task.

About one per cent of the parameters adapt the model to another data set or condition; the model itself never changes,
so nothing is forgotten, and many tasks share it. `nn.affiner` is the layer, `training.task_bank` the bank of tasks,
`training.task_training` their trainings.

Source: Diffscaler (arXiv 2404.09976), section 3. Ours: the branch of a convolution keeps its kernel in W_down; norms
and embeddings get scale and shift alone; s is learned, from 1.
"""

import re
from dataclasses import dataclass

from torch import nn

from smalti.core.errors import UserError
from smalti.nn.affiner import Form


@dataclass(frozen=True)
class DiffScaler:
    """Which layers get which parts.

    Args:
        rank: of the branches; 0 leaves them out.
        layers: pattern that the path of a layer must hold; all by default, the linear layers of adaLN among them, which
            matter most.
        strength: s, where it starts; it is learned unless `is_strength_fixed`.
        is_strength_fixed: keeps s at 1.

    Example:
        >>> DiffScaler(rank=4).__call__("blocks.0.modulation.linear", nn.Linear(8, 48)).rank
        4
    """

    rank: int = 8
    layers: str = ""
    strength: float = 1.0
    is_strength_fixed: bool = False

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise UserError(f"rank is {self.rank!r}; it must be a whole number from 0")
        try:
            re.compile(self.layers)
        except re.error as error:
            raise UserError(f"layers is {self.layers!r}, which is no pattern: {error}") from error

    def __call__(self, path: str, layer: nn.Module) -> Form | None:
        """The form of a layer, or None."""
        if not re.search(self.layers, path):
            return None
        return Form(rank=self.rank, strength=None if self.is_strength_fixed else self.strength)
