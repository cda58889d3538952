"""DraftAttention: a small attention between averaged tokens tells which blocks of the large one to compute.

Queries and keys of the image, as they come after norm and rotation, are averaged over groups of neighbouring tokens
(in the paper 8 rows and 16 columns of one frame). The softmax of these drafts is a map of groups; for every head the
best `1 - sparsity` of its entries are kept, and attention runs on these blocks alone, with all text. Every sample of
the batch, and so every branch of guidance, has its own map.

The average of rotated vectors loses the fastest frequencies inside a group: that is the method. Tokens are put in
order and back in every attention, since a method at this seam sees one attention at a time.

Source: DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance (arXiv 2505.14708), section 4.
Differences: every group attends to itself, so that no query is left without a key where there is no text; "row" and
"mass" are rules of our own; so are the guides that the draft is measured against.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self, get_args

from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.method import CoreCall, CoreMethod
from smalti.core.protocols import TokenLayout
from smalti.ops.block_scores import Guide, Rule, guide_scores, keep_blocks, kept_share
from smalti.ops.head_blocks import HeadBlocks, choose, head_block_attention, head_blocks, sparse_cost
from smalti.ops.token_order import Grid, GroupOrder, group_order
from smalti.seams.image_attention import check_image_grid, image_grid, keys_alone
from smalti.seams.schedule import is_early


@dataclass
class Memory:
    """Blocks by attention, with the evaluation in which they were chosen."""

    blocks: dict[str, tuple[int, HeadBlocks]] = field(default_factory=dict)


@dataclass(frozen=True)
class DraftAttention(CoreMethod):
    """Attention on the blocks that a draft of it finds important.

    Args:
        pool: (frames, rows, columns) of tokens that are averaged, and a block; on a GPU a multiple of 128 tokens.
        sparsity: share of blocks that is left out; 0 leaves attention as it is.
        dense_steps: first steps with full attention, a number or a share of the run below 1.
        rule: head (one threshold for all blocks of a head), row (equally many for every group) or mass (for every
            group as many as hold `1 - sparsity` of its draft).
        reuse: evaluations for which chosen blocks serve.
        dense_layers: depths of blocks with full attention, counted from 0 over all stacks.
        guide: draft; or what it is measured against: oracle (the attention itself, which saves nothing), random,
            window, frame-or-place (Sparse-VideoGen's two kinds of heads).

    Raises:
        UserError: a setting out of range.
    """

    pool: Grid = (1, 8, 16)
    sparsity: float = 0.9
    dense_steps: float = 0.25
    rule: Rule = "head"
    reuse: int = 1
    dense_layers: tuple[int, ...] = ()
    guide: Guide = "draft"

    owns = frozenset({"attention pattern"})
    work = "less"

    def __post_init__(self):
        if len(self.pool) != 3 or min(self.pool) < 1 or not 0 <= self.sparsity < 1:
            raise UserError(f"got pool={self.pool}, sparsity={self.sparsity}; give three sizes from 1, a share below 1")
        if self.dense_steps < 0 or self.reuse < 1:
            raise UserError(f"got dense_steps={self.dense_steps}, reuse={self.reuse}; give at least 0 and 1")
        for name, allowed in (("rule", get_args(Rule)), ("guide", get_args(Guide))):
            if getattr(self, name) not in allowed:
                raise unknown_name(f"{name} of DraftAttention", getattr(self, name), allowed)

    @classmethod
    def neutral(cls) -> Self:
        return cls(sparsity=0.0)

    @classmethod
    def active(cls) -> Self:
        return cls(pool=(1, 2, 2), sparsity=0.75, dense_steps=0)

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        small = {"pool": (1, 2, 2), "sparsity": 0.75}
        return (
            cls(**small, dense_steps=2, rule="row", reuse=3),
            cls(**small, dense_steps=1, rule="mass"),
            cls(**small, dense_steps=0, guide="window", rule="row"),
        )

    @classmethod
    def candidates(cls, steps: int, speedup: float) -> "tuple[Self, ...]":
        pools = ((1, 8, 16), (1, 4, 4), (1, 2, 2))
        return tuple(cls(pool, sparsity, dense_steps=0.1) for sparsity in (0.9, 0.75, 0.5) for pool in pools)

    @property
    def is_neutral(self) -> bool:
        return self.sparsity == 0

    def check_cores(self, model: str, cores: Mapping[str, tuple[TokenLayout, TokenLayout]]) -> None:
        check_image_grid(model, cores, "DraftAttention")

    def idle_reason(self, evaluations: int) -> str:
        return (
            f"in {evaluations} evaluations blocks of {self.pool} at sparsity {self.sparsity} would have cost as much "
            f"as plain attention, or dense_steps={self.dense_steps} and dense_layers={self.dense_layers} covered all; "
            "take a smaller pool or a higher sparsity"
        )

    def init(self) -> Memory:
        return Memory()

    def kept(self, state: Memory) -> int:
        return sum(blocks.nbytes for _, blocks in state.blocks.values())

    def at_core(self, state: Memory, call: CoreCall) -> Tensor:
        grid = image_grid(call.layout, call.key_layout)
        is_dense = self.is_neutral or call.site.depth in self.dense_layers
        if is_dense or grid is None or is_early(call.moment, self.dense_steps):
            return call.attend(call.q, call.k, call.v, call.mask)
        order, mask = group_order(grid, self.pool), keys_alone(call.mask, str(call.site))
        text = len(call.layout) - len(order.inverse)
        draft_cost = (order.count / len(call.layout)) ** 2 / 2
        share = kept_share(order.count, self.sparsity, self.rule)
        if sparse_cost(order, share or 0, text) + draft_cost >= 1:
            return call.attend(call.q, call.k, call.v, call.mask)
        kept = self._kept_blocks(state, call)
        blocks = self._choose_blocks(state, call, order, mask) if kept is None else kept
        share = blocks.attended if share is None else share
        backend = choose(order, share, text, call.q.device, mask)
        if backend == "full":
            return call.attend(call.q, call.k, call.v, call.mask)
        call.note(backend if kept is None else f"{backend}, blocks kept")
        return head_block_attention(call.q, call.k, call.v, blocks, mask, call.scale, backend)

    def _kept_blocks(self, state: Memory, call: CoreCall) -> HeadBlocks | None:
        """The blocks that this attention chose less than `reuse` evaluations ago."""
        made, blocks = state.blocks.get(_key(call), (0, None))
        return blocks if call.moment.evaluation - made < self.reuse else None

    def _choose_blocks(self, state: Memory, call: CoreCall, order: GroupOrder, mask: Tensor | None) -> HeadBlocks:
        image = call.layout.span("image")
        scores = guide_scores(
            self.guide, call.q, call.k, order, image.start, mask, call.scale, self.sparsity, call.site.depth
        )
        table = keep_blocks(scores, self.sparsity, self.rule)
        blocks = head_blocks(order, table, image.start, len(call.layout) - image.stop)
        if self.reuse > 1:
            state.blocks[_key(call)] = (call.moment.evaluation, blocks)
        return blocks


def _key(call: CoreCall) -> str:
    return f"{call.site}#{call.site.occurrence}"
