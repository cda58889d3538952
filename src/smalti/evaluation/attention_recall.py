"""How much of a model's attention a choice of blocks keeps: q and k of sampled heads are recorded while it runs.

Recall of a table is the share of attention among image tokens that lies in its blocks, sum over kept blocks of the true
scores / sum over all; density is the share of blocks that it keeps. What image tokens give to text is left out of both:
sparse attention keeps all of it. At one density no table has more recall than the best blocks of the true scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.method import CoreCall, CoreMethod
from smalti.ops.block_scores import Guide, Rule, guide_scores, keep_blocks, true_scores
from smalti.ops.token_order import Grid, GroupOrder, group_order
from smalti.seams.apply import apply
from smalti.seams.image_attention import image_grid, keys_alone


@dataclass(frozen=True)
class Seen:
    """One attention of a running model.

    Args:
        site: its name.
        depth: of its block.
        step: of the run.
        q, k: queries and keys of the sampled heads (B, h, L, d).
        mask: keys that may be attended to (B, 1, 1, L), or None.
        scale: factor on the scores, None = 1 / sqrt(d).
        grid: (F, H, W) of the image tokens.
        image: where they stand.
    """

    site: str
    depth: int
    step: int
    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float | None
    grid: Grid
    image: slice


Table = Callable[[Seen, GroupOrder], Tensor]
"""Chooses blocks of a recorded attention: a table (B, h, G, G), of which B and h may be 1."""


def guided(guide: Guide, sparsity: float, rule: Rule = "head") -> Table:
    """The choice of blocks that a guide and a rule make, as in the method."""

    def table(one: Seen, order: GroupOrder) -> Tensor:
        scores = guide_scores(guide, one.q, one.k, order, one.image.start, one.mask, one.scale, sparsity, one.depth)
        return keep_blocks(scores, sparsity, rule)

    return table


@dataclass(frozen=True)
class Recall:
    """What a choice of blocks keeps.

    Args:
        recall: mean share of attention kept.
        density: mean share of blocks kept.
        by_head: recall of every recorded attention, sample and head, in this order.
    """

    recall: float
    density: float
    by_head: tuple[float, ...]


def record_attention(
    target: Any,
    draw: Callable[[], object],
    steps: Sequence[int],
    heads: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
) -> list[Seen]:
    """q and k of the image's attention to itself while a model runs.

    Args:
        target: pipeline or model.
        draw: runs it.
        steps: which steps of the run.
        heads: which heads; None = all.
        depths: which blocks, counted from 0 over all stacks; None = all.

    Raises:
        UserError: nothing was recorded.
    """
    recorder = _Recorder(tuple(steps), None if heads is None else tuple(heads), None if depths is None else set(depths))
    with apply(target, recorder) as handle:
        draw()
        handle.remove(check=False)
    if not recorder.seen:
        raise UserError(f"no attention of image tokens on a grid ran at steps {list(steps)}; ask for others")
    return recorder.seen


def attention_recall(seen: Sequence[Seen], group: Grid, table: Table) -> Recall:
    """Recall and density of a choice of blocks over recorded attentions.

    Args:
        seen: of `record_attention`.
        group: (frames, rows, columns) of tokens in a group.
        table: the choice.
    """
    recalls, densities = [], []
    for one in seen:
        order = group_order(one.grid, group)
        true = true_scores(one.q, one.k, order, one.image.start, one.mask, one.scale)
        kept = table(one, order).to(true.device)
        recalls.append(((true * kept).sum((2, 3)) / true.sum((2, 3))).flatten())
        densities.append(float(kept.float().mean()))
    by_head = tuple(number for part in recalls for number in part.tolist())
    return Recall(sum(by_head) / len(by_head), sum(densities) / len(densities), by_head)


@dataclass(frozen=True)
class _Recorder(CoreMethod):
    """Looks at attention and changes nothing."""

    steps: tuple[int, ...]
    heads: tuple[int, ...] | None
    depths: set[int] | None
    seen: list[Seen] = field(default_factory=list, compare=False)

    order = 1_000
    """Innermost: what other methods hand on is seen."""

    @classmethod
    def neutral(cls) -> Self:
        return cls((), None, None)

    @classmethod
    def active(cls) -> Self:
        return cls((0,), None, None)

    @property
    def is_neutral(self) -> bool:
        return True

    def at_core(self, state: None, call: CoreCall) -> Tensor:
        grid = image_grid(call.layout, call.key_layout)
        is_wanted = call.moment.step in self.steps and (self.depths is None or call.site.depth in self.depths)
        if grid is not None and is_wanted:
            heads = slice(None) if self.heads is None else list(self.heads)
            q, k = (x[:, heads].detach().clone() for x in (call.q, call.k))
            mask, image = keys_alone(call.mask, str(call.site)), call.layout.span("image")
            site = call.site
            self.seen.append(Seen(str(site), site.depth, call.moment.step, q, k, mask, call.scale, grid, image))
        return call.attend(call.q, call.k, call.v, call.mask)
