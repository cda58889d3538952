"""REPA: hidden states of noisy pictures are drawn towards a frozen encoder's features of the clean ones.

The image tokens h after block `depth` pass a three-layer projector, and every token's cosine with the teacher's feature
of the same place is raised:

    L = - mean over samples and tokens of cos(y, projector(h)),   loss = objective + weight * L.

With several teachers, each has its own projector and their terms are averaged. Where the grids differ, the teacher's
map is resized to the model's.

Source: Representation Alignment for Generation (arXiv 2410.06940), section 3 and equation 8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.core.protocols import LossResult
from smalti.ops.token_grid import resize_tokens
from smalti.training.alignment import Alignment, AlignmentCall, teacher_features


@dataclass(frozen=True)
class REPASettings:
    """Hyperparameters.

    Args:
        depth: block whose output is aligned, from 1; about a third of all.
        weight: lambda in the paper.
        hidden: width of the projector.
        until: step from which the term is off; None = never.

    Raises:
        UserError: a value is out of range.
    """

    depth: int = 8
    weight: float = 0.5
    hidden: int = 2048
    until: int | None = None

    def __post_init__(self):
        if self.depth < 1 or self.hidden < 1 or self.weight < 0 or (self.until is not None and self.until < 0):
            raise UserError(f"got {self}; depth and hidden are at least 1, weight and until at least 0")


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

    def forward(self, call: AlignmentCall) -> LossResult | None:
        if self.chosen.weight == 0 or (self.chosen.until is not None and call.state.step >= self.chosen.until):
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


def projector(width: int, hidden: int, dim: int) -> nn.Sequential:
    """D -> hidden -> hidden -> Dz with SiLU between."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
    )


def match(features: Tensor, given: tuple[int, int] | None, grid: tuple[int, int, int]) -> Tensor:
    """Teacher features (B, T, Dz) on the model's grid (frames, rows, columns): (B, N, Dz).

    The features of every frame stand one after the other.

    Raises:
        UserError: the features are no whole number of such grids.
    """
    frames, rows, columns = grid
    if given is None:
        side = isqrt(features.shape[1] // frames)
        given = (rows, columns) if features.shape[1] == frames * rows * columns else (side, side)
    if given[0] * given[1] * frames != features.shape[1]:
        raise UserError(
            f"got {features.shape[1]} teacher tokens for {frames} frames; give the grid (rows, columns) of the teacher"
        )
    maps = features.unflatten(1, (frames, -1)).flatten(0, 1)
    return resize_tokens(maps, given, (rows, columns)).unflatten(0, (-1, frames)).flatten(1, 2)


def cosine(projected: Tensor, features: Tensor) -> Tensor:
    """Mean cosine over tokens and samples, in float32, of (B, N, Dz) and (B, N, Dz)."""
    return F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()
