"""An alignment term for a denoiser that sees only some of its tokens: teacher features of the places that it kept.

MicroDiT (arXiv 2407.15811) drops tokens, REPA (arXiv 2410.06940) compares every token with a teacher's feature of its
place. With both, a term gets the features at `cond.extra["keep"]`; without a mask it gets what it always gets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from smalti.core.errors import UserError
from smalti.core.protocols import LossResult
from smalti.ops.token_masks import KEEP
from smalti.ops.token_subset import gather
from smalti.training.alignment import Alignment, AlignmentCall


class KeptAlignment(Alignment):
    """A term on kept tokens.

    Args:
        term: the alignment.
        features: names of cached teacher features in `cond.extra`, (B, N, Dz) on the denoiser's own grid.

    Example:
        >>> term = KeptAlignment(REPA(192, [TeacherPort("teacher", 192)], REPASettings(depth=2)), ["teacher"])
    """

    def __init__(self, term: Alignment, features: Sequence[str] = ("teacher",)):
        super().__init__()
        self.term, self.features = term, tuple(features)
        self.name = term.name  # type: ignore[misc]  # of the term it stands for

    @property
    def depths(self) -> tuple[int, ...]:
        return self.term.depths

    @property
    def attentions(self) -> tuple[int, ...]:
        return self.term.attentions

    def open(self, denoiser: nn.Module) -> None:
        self.term.open(denoiser)

    def close(self) -> None:
        self.term.close()

    def release(self) -> None:
        self.term.release()

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.term.settings

    def forward(self, call: AlignmentCall) -> LossResult | None:
        """The term at the kept places, or at all of them after a block that comes before the drop.

        Raises:
            UserError: features are not cached.
        """
        keep = call.cond.extra.get(KEEP)
        if keep is None or any(call.taken.tokens[depth].shape[1] != keep.shape[1] for depth in self.depths):
            return self.term(call)
        missing = [name for name in self.features if name not in call.cond.extra]
        if missing:
            raise UserError(f"kept tokens are aligned with cached features, and the batch holds no {missing[0]!r}")
        extra = {**call.cond.extra, **{name: gather(call.cond.extra[name], keep) for name in self.features}}
        grid = (1, keep.shape[1], 1)  # kept tokens stand in no rectangle; each is compared with its own place alone
        taken = replace(call.taken, grid=grid)
        return self.term(replace(call, taken=taken, cond=replace(call.cond, extra=extra)))
