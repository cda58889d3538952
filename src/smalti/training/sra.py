"""SRA: an earlier block of a denoiser follows a later block of its own average, which sees the sample with less noise.

    h_s = head(tokens of the model after block m at (x_t, t)),  h_t = tokens of the average after block n at (x_s, s)
    loss = objective + w * d(h_s, h_t),    s = clamp(t - u * largest, 0, 1), the same data, noise and conditions

No encoder is needed, so anything can be learned in this way. The head is the student's alone and stays behind; the
average is the one that samples are drawn with, frozen, in evaluation mode, and ends after block n. Conditions that a
source has dropped are dropped for both, since they come with the batch.

Source: SRA (arXiv 2505.02831), section 3 and its code (vvvvvjdy/SRA), whose later choice is the cosine with a constant
weight of 0.5; the paper has smooth-L1 of weight 0.2 that decays late. Paper: SiT-XL/2 m = 8, n = 20 of 28.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import Cond, LossResult
from smalti.objectives.paired_noise import NoisePairs, StraightPairs
from smalti.objectives.two_groups import GROUPS
from smalti.seams.group_watch import GroupWatch
from smalti.seams.taps import Taps
from smalti.seams.truncated import truncated
from smalti.training.alignment import Alignment, AlignmentCall
from smalti.training.run_state import plain
from smalti.training.sharding import local, put_away

DISTANCES = ("cos", "smooth-l1", "l1", "l2")
DEVIATION = "teacher deviation"
"""Name of the mean deviation of the teacher's features from sample to sample among a step's figures."""


@dataclass(frozen=True)
class SRASettings:
    """Hyperparameters.

    Args:
        student: m, block of the model, from 1.
        teacher: n, block of the average; above m (the other way round it is a control, which must not help).
        distance: cos is 1 - cosine; the others are means over all numbers.
        beta: of smooth-L1, where it turns from a square into a line.
        weight: w.
        start: step before which the term is off, because the average has learned nothing yet.
        decay_from: step from which the weight falls; None = never.
        decay_span: steps in which it falls to a tenth.
        pairs: which sample the average sees.
        has_groups: experimental: the model's tokens stand in two groups that do not see each other, as
            `TwoGroupFlowMatching` says, and `pairs` are `LesserPairs`.

    Raises:
        UserError: a value is out of range.
    """

    student: int = 8
    teacher: int = 20
    distance: Literal["cos", "smooth-l1", "l1", "l2"] = "cos"
    beta: float = 0.05
    weight: float = 0.5
    start: int = 0
    decay_from: int | None = None
    decay_span: int = 1000
    pairs: NoisePairs = field(default_factory=StraightPairs)
    has_groups: bool = False

    def __post_init__(self):
        if self.distance not in DISTANCES:
            raise unknown_name("distance of features", self.distance, DISTANCES)
        if min(self.student, self.teacher, self.decay_span) < 1 or self.student == self.teacher:
            raise UserError(f"got {self}; blocks and decay_span are at least 1, and the two blocks differ")
        if min(self.weight, self.start, self.decay_from or 0) < 0 or self.beta <= 0:
            raise UserError(f"got {self}; weight and steps are at least 0, beta is above 0")

    def weight_at(self, step: int) -> float:
        """w at a step, counted from 0."""
        if step < self.start:
            return 0.0
        late = 0 if self.decay_from is None else max(0, step - self.decay_from)
        return self.weight * 0.1 ** (late / self.decay_span)


class SelfAlignment(Alignment):
    """The term.

    Args:
        width: D of the denoiser's tokens.
        settings: blocks, distance, weight.
        is_compiled: whether the average's forward is compiled; it has a graph of its own.

    Raises:
        UserError: at a call, nothing is averaged, or the model drops labels by itself.

    Example:
        >>> term = SelfAlignment(192, SRASettings(student=3, teacher=6, start=500))
        >>> Trainer(model, FlowMatching(), source, TrainConfig(ema=0.999, ...), out, losses=[term]).fit()
    """

    name = "sra"

    def __init__(self, width: int, settings: SRASettings | None = None, is_compiled: bool = False):
        super().__init__()
        self.chosen, self.is_compiled = settings or SRASettings(), is_compiled
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self._teacher: _Teacher | None = None
        self._groups: GroupWatch | None = None

    @property
    def depths(self) -> tuple[int, ...]:
        return (self.chosen.student,)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**asdict(self.chosen), "pairs": plain(self.chosen.pairs)}

    def open(self, denoiser: nn.Module) -> None:
        if self.chosen.has_groups:
            self._groups = GroupWatch(denoiser, GROUPS)

    def close(self) -> None:
        if self._groups is not None:
            self._groups.remove()
            self._groups = None

    def release(self) -> None:
        self._teacher = None

    def forward(self, call: AlignmentCall) -> LossResult | None:
        weight = self.chosen.weight_at(call.state.step)
        if weight == 0:
            return None
        assert call.x0 is not None, "an aligned model was called without its objective"
        earlier = self.chosen.pairs.draw(call.x0.float(), call.x.float(), call.t, call.generator)
        look: Any = self._look
        seen = look(call.state.ema, earlier.x.to(call.x.dtype), earlier.t, call.cond)
        apart = distance(
            self.head(call.taken.tokens[self.chosen.student]), seen, self.chosen.distance, self.chosen.beta
        )
        return LossResult(weight * apart, {"self distance": apart.detach(), DEVIATION: deviation(seen)})

    @torch.compiler.disable
    def _look(self, average: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The average's tokens (B, N, D) after block n, without gradient."""
        if self._teacher is None or self._teacher.average is not average:
            self._teacher = _Teacher(average, self.chosen.teacher, self.is_compiled)
        return self._teacher(x, t, cond)


class _Teacher:
    """An averaged model up to a block; no module, so it is neither trained nor saved."""

    def __init__(self, average: Any, depth: int, is_compiled: bool):
        if average is None or any(one.requires_grad for one in average.parameters()):
            raise UserError("self-alignment follows averaged weights, and nothing is averaged; set ema above 0")
        if any(getattr(one, "dropout_prob", 0) > 0 for one in average.modules()):
            raise UserError(
                "the model drops labels by itself, where teacher and student would drop different ones; build it with "
                "class_dropout_prob 0 and let the source drop them"
            )
        self.average, self.depth = average, depth
        is_whole = all(local(one) is one for one in average.parameters())
        self.model = truncated(average, depth) if is_whole else average  # pieces come together in a whole call alone
        if is_compiled:
            self.model.compile()
        self.taps = Taps(self.model, [depth])

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.model(x, t, cond)
        put_away(self.model)
        return self.taps.taken.tokens[self.depth].detach()


def distance(student: Tensor, teacher: Tensor, kind: str, beta: float = 0.05) -> Tensor:
    """How far features (B, N, D) lie from those of a teacher (B, N, D), one number () in float32."""
    student, teacher = student.float(), teacher.float()
    match kind:
        case "cos":
            return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()
        case "smooth-l1":
            return F.smooth_l1_loss(student, teacher, beta=beta)
        case "l1":
            return F.l1_loss(student, teacher)
        case _:
            return F.mse_loss(student, teacher)


def deviation(features: Tensor) -> Tensor:
    """Mean standard deviation () of features (B, N, D) from sample to sample; near 0 they have collapsed."""
    return features.float().std(0, correction=0).mean()
