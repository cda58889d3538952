"""HASTE: features and attention maps of a denoiser are drawn towards a frozen encoder's, until a rule ends it for good.

    loss = objective + w_f * L_feat + w_a * L_attn        in the first phase, the objective alone in the second
    L_feat = - mean cos(y, projector(h after block `depth`))
    L_attn = mean over pairs (student block i, teacher block j) of the cross-entropy of i's attention maps from j's

L_feat is REPA's. Maps are distributions of image tokens over image tokens, the first min(h_s, h_t) heads compared, the
student's own attention left as it is; its logits are computed beside the fused kernel, block by block, in the first
phase alone. The end of it is a rule of `training.stopping`; then the teacher is let go and no tap is left.

Source: HASTE (arXiv 2505.16792), section 3 (both alignments) and 4 (termination). The paper's pairs for SiT-XL/2 and
DINOv2-B are blocks 5 to 8 with 9 to 12.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smalti.core.errors import UserError
from smalti.core.protocols import LossResult
from smalti.ops.attention_maps import attention_cross_entropy, attention_entropy
from smalti.seams.taps import ImageAttention
from smalti.tokenizers.vision_encoder import FeatureTeacher
from smalti.training.alignment import Alignment, AlignmentCall
from smalti.training.feature_alignment import cosine, match, projector
from smalti.training.teacher_attention import AttentionTeacher, View


@dataclass(frozen=True)
class HASTESettings:
    """Hyperparameters.

    Args:
        depth: block whose output is aligned, from 1.
        pairs: (student block, teacher block) whose attention is aligned, from 1.
        feature_weight: lambda_R in the paper.
        attention_weight: lambda_A in the paper.
        hidden: width of the projector.

    Raises:
        UserError: a value is out of range.
    """

    depth: int = 8
    pairs: tuple[tuple[int, int], ...] = ((5, 9), (6, 10), (7, 11), (8, 12))
    feature_weight: float = 0.5
    attention_weight: float = 0.5
    hidden: int = 2048

    def __post_init__(self):
        blocks = [self.depth, *(one for pair in self.pairs for one in pair)]
        if min(blocks) < 1 or self.hidden < 1 or min(self.feature_weight, self.attention_weight) < 0:
            raise UserError(f"got {self}; blocks and hidden are at least 1, weights at least 0")
        students = [student for student, _ in self.pairs]
        if len(set(students)) < len(students):
            raise UserError(f"got pairs {self.pairs}; each block of the student stands in one pair")


def small_pairs(depth: int, teacher_depth: int) -> tuple[tuple[int, int], ...]:
    """Pairs for small models: the student's second quarter with as many of the teacher's last third, evenly spread."""
    students = range(depth // 4 + 1, max(depth // 4 + 1, depth // 2) + 1)
    count = min(len(students), max(1, teacher_depth // 3))
    return tuple((students[-count + k], teacher_depth - count + 1 + k) for k in range(count))


class HolisticAlignment(Alignment):
    """The term.

    Args:
        width: D of the denoiser's tokens.
        teacher: any vision transformer of `load_teacher`; it sees `cond.extra["pixels"]` (B, 3, H, W) in [-1, 1].
        settings: depth, pairs, weights.

    Raises:
        UserError: the teacher has no such block.

    Example:
        >>> term = HolisticAlignment(192, load_teacher("vit-self"), HASTESettings(2, pairs=((2, 5), (3, 6))))
        >>> rule = StopAt(("haste",), step=300)
        >>> Trainer(model, FlowMatching(), source, config, out, losses=[term], stops=[rule]).fit()
    """

    name = "haste"

    def __init__(self, width: int, teacher: FeatureTeacher, settings: HASTESettings | None = None):
        super().__init__()
        self.chosen = settings or HASTESettings()
        self.project = projector(width, self.chosen.hidden, teacher.dim)
        seen = [block for _, block in self.chosen.pairs] if self.chosen.attention_weight else []
        self.teacher: AttentionTeacher | None = AttentionTeacher(teacher, seen)

    @property
    def depths(self) -> tuple[int, ...]:
        return (self.chosen.depth,)

    @property
    def attentions(self) -> tuple[int, ...]:
        return tuple(block for block, _ in self.chosen.pairs) if self.chosen.attention_weight else ()

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**asdict(self.chosen), "pairs": [list(pair) for pair in self.chosen.pairs]}

    def release(self) -> None:
        self.teacher = None

    @torch.compiler.disable  # hooks on a teacher and maps that are computed twice are in nobody's graph
    def forward(self, call: AlignmentCall) -> LossResult | None:
        chosen, grid = self.chosen, call.taken.grid
        if not chosen.feature_weight and not chosen.attention_weight:
            return None
        if grid is None or grid[0] != 1:
            raise UserError(f"image tokens lie on a grid {grid} (frames, rows, columns); one frame of a known grid is "
                            "needed to match a teacher of pictures")  # fmt: skip
        if "pixels" not in call.cond.extra:
            raise UserError("the batch holds no pixels for the teacher; give the source a table of `pixels`")
        assert self.teacher is not None, "a released term was called"
        view = self.teacher(call.cond.extra["pixels"])
        close = cosine(self.project(call.taken.tokens[chosen.depth]), match(view.tokens, view.grid, grid))
        loss, metrics = -chosen.feature_weight * close, {"alignment cosine": close.detach()}
        if self.attentions:
            terms: list[Tensor] = []
            entropies: list[Tensor] = []
            for student, teacher in chosen.pairs:
                own = call.taken.attention[student]
                # Maps are computed again in the backward pass: none but one block's exist at a time.
                term, entropy = checkpoint(
                    _compare, own, view, teacher, grid[1:], use_reentrant=False, preserve_rng_state=False
                )  # type: ignore[misc]
                terms.append(term)
                entropies.append(entropy)
            apart = torch.stack(terms).mean()
            loss = loss + chosen.attention_weight * apart
            metrics |= {
                "attention cross-entropy": apart.detach(),
                "attention entropy of the teacher": torch.stack(entropies).mean(),
            }
        return LossResult(loss, metrics)


def _compare(own: ImageAttention, view: View, block: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cross-entropy () of a student's maps from those of a teacher's block, and the entropy () of these."""
    logits, maps = own.logits(), view.maps(block, grid)
    return attention_cross_entropy(logits, maps), attention_entropy(maps[:, : logits.shape[1]])
