"""VF loss: latents of an autoencoder are aligned with what a frozen vision model sees at the same places.

A latent z_i is projected to the width of the features, z'_i = W z_i, and then

    cos term       mean over i of       relu(1 - m1 - cos(z'_i, F_i))
    matrix term    mean over i, j of    relu(| cos(z'_i, z'_j) - cos(F_i, F_j) | - m2)      within a picture

Their sum counts with `weight` times the adaptive weight that every term on latents has (`training.tokenizer`). Margins
let go of pairs that are near enough, so that a last phase regains reconstruction. `projects` "features" turns the
projection round, onto the latents' channels.

The paper trains in three phases: aligned strongly, then weakly, then weakly with margins; `paper_phases` gives them for
any number of steps. One training goes through all of them: weights, critic, projection and moments stay. The last
phase lowers the alignment on purpose, so it is judged by reconstruction.

Source: Reconstruction vs. Generation (arXiv 2501.01423), section 3.2, equations 1 to 6.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import Cond
from smalti.ops.token_grid import resize_tokens
from smalti.training.tokenizer import LatentTerm

PROJECTIONS = ("latents", "features")


@dataclass(frozen=True)
class VFSettings:
    """Hyperparameters.

    Args:
        weight: of the loss before its adaptive weight.
        cos_margin: m1, in [0, 2].
        distance_margin: m2, in [0, 2].
        projects: latents (up to the features' width) or features (down to the latents' channels).
        features: name of the teacher's features in `cond.extra`.

    Raises:
        UserError: a value is out of range.
    """

    weight: float = 0.1
    cos_margin: float = 0.0
    distance_margin: float = 0.0
    projects: Literal["latents", "features"] = "latents"
    features: str = "teacher"

    def __post_init__(self):
        if self.projects not in PROJECTIONS:
            raise unknown_name("projection", self.projects, PROJECTIONS)
        if self.weight < 0 or not (0 <= self.cos_margin <= 2 and 0 <= self.distance_margin <= 2):
            raise UserError(f"got {self}; the weight is at least 0, and margins are from 0 to 2")


EPOCHS = (100, 15, 15)
"""Lengths of the paper's phases."""


def paper_phases(steps: int) -> dict[int, VFSettings]:
    """The paper's phases by their first step: weight 0.5, then 0.1, then 0.1 with margins 0.5 and 0.25.

    Args:
        steps: of the whole training, shared out as 100, 15 and 15 epochs; at least 26.
    """
    if steps < sum(EPOCHS) // 5:
        raise UserError(f"{steps} steps are too few for phases of {EPOCHS}; take at least {sum(EPOCHS) // 5}")
    starts = [0, steps * EPOCHS[0] // sum(EPOCHS), steps * (EPOCHS[0] + EPOCHS[1]) // sum(EPOCHS)]
    kinds = (VFSettings(0.5), VFSettings(0.1), VFSettings(0.1, cos_margin=0.5, distance_margin=0.25))
    return dict(zip(starts, kinds, strict=True))


class VFLoss(LatentTerm):
    """The term.

    Args:
        channels: C of the latents.
        dim: Dz of the teacher's features (B, T, Dz), whose grid is square.
        settings: weight and margins.
        later: those from later steps on, by step; only weight and margins may differ.

    Raises:
        UserError: a later phase begins at step 0 or changes something else.

    Example:
        >>> term = VFLoss(16, 192, VFSettings(weight=0.1))
        >>> fit_tokenizer(autoencoder, pictures, config, out, terms=[term], source=source)
    """

    name = "vf"

    def __init__(
        self, channels: int, dim: int, settings: VFSettings | None = None,
        later: Mapping[int, VFSettings] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.chosen = settings or VFSettings()
        self.phases = {0: self.chosen, **dict(sorted((later or {}).items()))}
        for start, phase in (later or {}).items():
            if start < 1 or (phase.projects, phase.features) != (self.chosen.projects, self.chosen.features):
                raise UserError(f"a phase from step {start} with {phase} cannot follow; it begins later, same features")
        widths = (channels, dim) if self.chosen.projects == "latents" else (dim, channels)
        self.project = nn.Linear(*widths, bias=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        first = asdict(self.phases[0])
        later = {str(start): asdict(phase) for start, phase in self.phases.items() if start}
        return {**first, "later": later} if later else first

    @property
    def weight(self) -> float:
        return self.chosen.weight

    def at(self, step: int) -> None:
        self.chosen = self.phases[max(start for start in self.phases if start <= step)]

    def forward(self, latents: Tensor, cond: Cond) -> Tensor:
        if self.chosen.features not in cond.extra:
            raise UserError(f"the batch holds no features {self.chosen.features!r}; give a source that has them")
        height, width = latents.shape[-2:]
        seen = cond.extra[self.chosen.features].float()
        side = isqrt(seen.shape[1])
        if side**2 != seen.shape[1]:
            raise UserError(f"got {seen.shape[1]} features of a picture; their grid has to be square")
        seen = resize_tokens(seen, (side, side), (height, width))  # (B, h*w, Dz)
        own = latents.flatten(2).mT.float()  # (B, h*w, C)
        if self.chosen.projects == "latents":
            own = self.project(own)
        else:
            seen = self.project(seen)
        own, seen = F.normalize(own, dim=-1), F.normalize(seen, dim=-1)
        cosine = (1 - self.chosen.cos_margin - (own * seen).sum(-1)).relu().mean()
        matrices = ((own @ own.mT - seen @ seen.mT).abs() - self.chosen.distance_margin).relu().mean()
        return cosine + matrices
