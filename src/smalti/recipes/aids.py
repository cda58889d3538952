"""Training aids as switches of one training: each alone, or several together.

    teacher       hidden states are drawn to a frozen encoder's features (REPA, arXiv 2410.06940)
    ends          the share of the steps after which that stops for good (HASTE, arXiv 2505.16792, section 4)
    is_own        hidden states are drawn to those of the averaged model under less noise (SRA, arXiv 2505.02831)
    mask          tokens are dropped behind a patch-mixer, until the last tenth (MicroDiT, arXiv 2407.15811)
    time          at which times the model trains (logit-normal: arXiv 2403.03206, section 3.1; LightningDiT)
    is_lightning  RMS norms, SwiGLU and rotary positions in the blocks (LightningDiT, arXiv 2501.01423, section 4.2)
    optimizer     Muon on the matrices of the blocks, in place of AdamW
    tuned_width   rates tuned at this width and carried to the model's by muP (arXiv 2203.03466; for DiT 2505.15270)

What differs from a plain training is said by the fields alone, so a table of aids is a table of these.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from smalti.backbones.dit import DiT
from smalti.backbones.lightning_dit import LightningDiT
from smalti.backbones.mixed_dit import with_patch_mixer
from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import Objective
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.masked_loss import MaskedFlowMatching
from smalti.objectives.switched import Switched
from smalti.objectives.time_sampling import LogitNormal, TimeDistribution, Uniform
from smalti.ops.token_masks import RandomMask
from smalti.training.alignment import Alignment
from smalti.training.config import OPTIMIZERS
from smalti.training.kept_alignment import KeptAlignment
from smalti.training.mup import MuP
from smalti.training.optimizers import Factors
from smalti.training.repa import REPA, REPASettings, TeacherPort
from smalti.training.sra import SelfAlignment, SRASettings
from smalti.training.stopping import StopAt, StopRule

TIMES: dict[str, Callable[[], TimeDistribution]] = {"uniform": Uniform, "logit-normal": LogitNormal}
FEATURES = "teacher"
"""Name of a teacher's features in a batch."""
WHOLE = 0.1
"""Share of the steps at the end that see all tokens."""
HEAD = 32
WARM = 1 / 6
"""Share of the steps before which nothing follows the averaged model."""


@dataclass(frozen=True)
class Aids:
    """Which aids a training has; as it stands, none.

    Args:
        teacher: a name that `load_teacher` knows; empty = no alignment.
        ends: share of the steps after which the alignment stops, in (0, 1]; 1 = never.
        is_own: alignment with the averaged model.
        mask: share of the tokens that are dropped, in [0, 1).
        time: uniform or logit-normal.
        is_lightning: LightningDiT's blocks in place of DiT's.
        optimizer: adamw or muon.
        tuned_width: base width of muP; None = no muP.

    Raises:
        UserError: a value is out of range, or two aids exclude each other.
    """

    teacher: str = ""
    ends: float = 1.0
    is_own: bool = False
    mask: float = 0.0
    time: Literal["uniform", "logit-normal"] = "uniform"
    is_lightning: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    tuned_width: int | None = None

    def __post_init__(self):
        if not 0 <= self.mask < 1:
            raise UserError(f"the share of dropped tokens is {self.mask}; choose one from 0, below 1")
        if not 0 < self.ends <= 1:
            raise UserError(f"alignment ends after {self.ends} of the steps; choose a share above 0, up to 1")
        if self.mask and self.is_own:
            raise UserError("an averaged model sees all tokens, and a mask drops some; choose one of the two")
        if self.mask and self.is_lightning:
            raise UserError("rotary positions stand for all tokens, and a mask drops some; choose one of the two")
        for kind, value, known in (("times", self.time, TIMES), ("optimizer", self.optimizer, OPTIMIZERS)):
            if value not in known:
                raise unknown_name(kind, value, known)

    def __or__(self, other: "Aids") -> "Aids":
        """Those of both; where both say something, the other's."""
        return replace(self, **other.said)

    @property
    def said(self) -> dict[str, Any]:
        """The fields that differ from a plain training's."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}

    def objective(self, steps: int, patch_size: int = 1) -> Objective:
        """Flow matching for so many steps, of a denoiser with patches of this size."""
        time = TIMES[self.time]()
        whole = FlowMatching(time)
        if not self.mask:
            return whole
        masked = MaskedFlowMatching(RandomMask(self.mask), patch_size, time)
        return Switched(masked, whole, steps - round(WHOLE * steps))

    def model(self, width: int, depth: int, **shape: Any) -> "Started":
        """A fresh denoiser of one patch a token, of this width and depth (with the mixer's block), and its rates."""

        def build(width: int) -> nn.Module:
            def dit(depth: int) -> nn.Module:
                kind = LightningDiT if self.is_lightning else DiT
                return kind(depth=depth, heads=width // HEAD, head_dim=HEAD, **shape)

            return with_patch_mixer(dit(depth - 1), 1, width, HEAD) if self.mask else dit(depth)

        if self.tuned_width is None:
            return Started(build(width), None)
        mu = MuP(build, self.tuned_width, start="own")
        model = mu.model(width)
        return Started(model, mu.factors(model, self.optimizer))

    def losses(self, width: int, depth: int, features: int, steps: int) -> list[Alignment]:
        """Terms on the hidden states after a third of the blocks.

        Args:
            width, depth: of the denoiser.
            features: width of the teacher's.
            steps: of the training; the averaged model is followed after some of them.
        """
        third, terms = max(1, depth // 3), []
        if self.teacher:
            settings = REPASettings(third, hidden=4 * width)
            terms.append(KeptAlignment(REPA(width, [TeacherPort(FEATURES, features)], settings), [FEATURES]))
        if self.is_own:
            terms.append(SelfAlignment(width, SRASettings(third, 2 * third, start=round(WARM * steps))))
        return terms

    def stops(self, steps: int) -> list[StopRule]:
        """Rules by which terms end in a training of so many steps."""
        return [StopAt((REPA.name,), round(self.ends * steps))] if self.teacher and self.ends < 1 else []


@dataclass(frozen=True)
class Started:
    """A denoiser with fresh weights, and muP's factors on the rates of its parameters."""

    model: nn.Module
    factors: dict[str, Factors] | None


AIDS = {
    "repa": Aids(teacher="vit-caption"),
    "repa, ended early": Aids(teacher="vit-caption", ends=0.3),
    "sra": Aids(is_own=True),
    "microdit": Aids(mask=0.5),
    "lightningdit": Aids(is_lightning=True),
    "logit-normal": Aids(time="logit-normal"),
    "muon": Aids(optimizer="muon"),
    "mup": Aids(tuned_width=32),
}
"""Each aid alone."""
