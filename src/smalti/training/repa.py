"""REPA: hidden states of noisy pictures are drawn towards a frozen encoder's features of the clean ones.

The image tokens h after block `depth` pass a three-layer projector, and every token's cosine with the teacher's feature
of the same place is raised:

    L = - mean over samples and tokens of cos(y, projector(h)),   loss = objective + weight * L.

With several teachers, each has its own projector and their terms are averaged. Where the grids differ, the teacher's
map is resized to the model's.

Source: Representation Alignment for Generation (arXiv 2410.06940), section 3 and equation 8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from smalti.core.errors import UserError
from smalti.core.protocols import LossResult
from smalti.training.alignment import Alignment, AlignmentCall, teacher_features
from smalti.training.feature_alignment import cosine, match, projector


@dataclass(frozen=True)
class REPASettings:
    """Hyperparameters.

    Args:
        depth: block whose output is aligned, from 1; about a third of all.
        weight: lambda in the paper.
        hidden: width of the projector.

    Raises:
        UserError: a value is out of range.
    """

    depth: int = 8
    weight: float = 0.5
    hidden: int = 2048

    def __post_init__(self):
        if self.depth < 1 or self.hidden < 1 or self.weight < 0:
            raise UserError(f"got {self}; depth and hidden are at least 1, the weight at least 0")


@dataclass(frozen=True)
class TeacherPort:
    """Where features of a teacher come from.

    Args:
        name: key of cached features in `cond.extra`.
        dim: their width Dz.
        teacher: for features that are not cached: called on `cond.extra["pixels"]` (B, 3, H, W) in [-1, 1].
        grid: (rows, columns) of its features; None = the model's own if they are as many, else square.
    """

    name: str
    dim: int
    teacher: nn.Module | None = None
    grid: tuple[int, int] | None = None


class REPA(Alignment):
    """The alignment term.

    Args:
        width: D of the denoiser's tokens.
        teachers: at least one.
        settings: depth, weight and the like.

    Example:
        >>> term = REPA(192, [TeacherPort("teacher", 192)], REPASettings(depth=2))
        >>> Trainer(model, FlowMatching(), source, config, out, losses=[term]).fit()
    """

    name = "repa"

    def __init__(self, width: int, teachers: Sequence[TeacherPort], settings: REPASettings | None = None):
        super().__init__()
        if not teachers:
            raise UserError("got no teacher; give at least one")
        self.chosen = settings or REPASettings()
        self.ports = tuple(teachers)  # not registered: a teacher is neither trained nor saved
        self.projectors = nn.ModuleList(projector(width, self.chosen.hidden, port.dim) for port in teachers)

    @property
    def depths(self) -> tuple[int, ...]:
        return (self.chosen.depth,)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**asdict(self.chosen), "teachers": [port.name for port in self.ports]}

    def release(self) -> None:
        self.ports = tuple(replace(port, teacher=None) for port in self.ports)

    def forward(self, call: AlignmentCall) -> LossResult | None:
        if self.chosen.weight == 0:
            return None
        tokens, grid = call.taken.tokens[self.chosen.depth], call.taken.grid
        if grid is None:
            raise UserError("the grid of the image tokens could not be read, so no teacher can be matched to them")
        cosines = []
        for port, project in zip(self.ports, self.projectors, strict=True):
            features = match(teacher_features(call, port.name, port.teacher), port.grid, grid)
            cosines.append(cosine(project(tokens), features))
        mean = torch.stack(cosines).mean()
        return LossResult(-self.chosen.weight * mean, {"alignment cosine": mean.detach()})
