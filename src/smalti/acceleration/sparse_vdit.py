"""Sparse-vDiT: every head of every attention keeps to the sparse pattern that was found for it once, offline.

Attention maps of video transformers fall into few shapes, which belong to the head and hardly to the prompt. So a
search on a few prompts decides for every head: full, skipped, diagonal, multi-diagonal or stripes (see
`ops.head_patterns`), and a plan (`acceleration.head_plan`) says it to every later run. Heads of an attention with equal
modes are gathered into one call and its results scattered back; a skipped head gives zeros, and the output projection
keeps its bias.

Source: Sparse-vDiT (arXiv 2506.03065), section 4. Differences: widths of the patterns; losses divided by the mean
square of the outputs, since a threshold of raw errors fits one model; groups of steps; `dense_steps` at the beginning.

Example:
    >>> plan = search_sparse_plan(pipe, ["a cat runs", "rain"], target=0.5)
    >>> smalti.apply(pipe, SparseVDiT(plan))
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from smalti.acceleration.head_plan import HeadPlan, SiteModes
from smalti.acceleration.plan_search import find_plan
from smalti.core.errors import UserError
from smalti.core.method import CoreCall, CoreMethod, Reading
from smalti.core.protocols import TokenLayout
from smalti.core.seeds import generators_for
from smalti.evaluation.pattern_losses import SPARSE, record_columns, record_losses, site_name
from smalti.ops.head_patterns import Mode, Patterns, mode_attention, mode_density, stripe_columns
from smalti.ops.token_order import Grid
from smalti.seams.image_attention import check_image_grid, image_grid, keys_alone
from smalti.seams.schedule import is_early

IN_TURN = HeadPlan(rest=("diagonal", "multi-diagonal", "stripes", "full"))
"""Without a search: the modes one after another over the heads."""


@dataclass(frozen=True)
class SparseVDiT(CoreMethod):
    """Attention in which every head has the pattern of a plan.

    Args:
        plan: of all heads, or the path of its file; None = the modes in turn, which says what a plan may save.
        dense_steps: first steps with full attention, a number or a share of the run below 1.

    Raises:
        UserError: no plan in the file, or steps below 0.
    """

    plan: HeadPlan | str | Path | None = None
    dense_steps: float = 0

    owns = frozenset({"attention pattern"})
    work = "less"

    def __post_init__(self):
        if self.dense_steps < 0:
            raise UserError(f"got dense_steps={self.dense_steps}; give a number of steps, or a share below 1")
        _ = self.heads  # a file that holds no plan is told of here

    @cached_property
    def heads(self) -> HeadPlan:
        """The plan itself, read if it is a file."""
        if self.plan is None:
            return IN_TURN
        return self.plan if isinstance(self.plan, HeadPlan) else HeadPlan.load(self.plan)

    def __str__(self) -> str:
        """With what a plan is, not with its heads."""
        made_for = self.heads.model or f"any model, heads in turn {', '.join(self.heads.rest)}"
        return f"{type(self).__name__}(a plan for {made_for}, dense_steps={self.dense_steps})"

    @classmethod
    def neutral(cls) -> Self:
        return cls(HeadPlan(rest=("full",)))

    @classmethod
    def active(cls) -> Self:
        return cls(HeadPlan(rest=("stripes", "diagonal", "full")))

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (cls(HeadPlan(rest=("skip", "full"))), cls(HeadPlan(rest=("multi-diagonal", "stripes")), dense_steps=3))

    @property
    def is_neutral(self) -> bool:
        return self.heads.is_full

    def check(self, reading: Reading) -> None:
        self.heads.check(reading)

    def check_cores(self, model: str, cores: Mapping[str, tuple[TokenLayout, TokenLayout]]) -> None:
        check_image_grid(model, cores, "SparseVDiT")

    def idle_reason(self, evaluations: int) -> str:
        return (
            f"in {evaluations} evaluations no head had a pattern that leaves keys out on this grid, or "
            f"dense_steps={self.dense_steps} covered all; take a sparser plan or fewer dense steps"
        )

    def at_core(self, state: None, call: CoreCall) -> Tensor:
        grid = image_grid(call.layout, call.key_layout)
        if self.is_neutral or grid is None or is_early(call.moment, self.dense_steps):
            return call.attend(call.q, call.k, call.v, call.mask)
        chosen = self.heads.at(call.moment, site_name(call.site), call.q.shape[1])
        groups = _by_mode(chosen, self.heads.patterns, grid)
        if set(groups) == {"full"}:
            return call.attend(call.q, call.k, call.v, call.mask)
        known = self.heads.grid
        call.note("sparse heads" if known in (None, grid) else f"sparse heads, the plan of {known} laid out anew")
        return self._fused(call, grid, groups, chosen)

    def _fused(self, call: CoreCall, grid: Grid, groups: dict[Mode, list[int]], chosen: SiteModes) -> Tensor:
        """One call for each mode: heads gathered, results scattered back (B, h, L, d)."""
        mask, before = keys_alone(call.mask, str(call.site)), call.layout.span("image").start
        out = call.q.new_empty(*call.q.shape[:3], call.v.shape[-1])
        for mode, heads in groups.items():
            index = _slice(heads)
            q, k, v = (x[:, index] for x in (call.q, call.k, call.v))
            columns = None
            if mode == "stripes" and chosen.cells:
                cells = tuple(chosen.cells[head] for head in heads)
                columns = stripe_columns(grid, self.heads.patterns.stripes, cells, self.heads.grid)
            out[:, index] = mode_attention(q, k, v, mode, self.heads.patterns, grid, before, mask, call.scale, columns)
        return out


def _by_mode(chosen: SiteModes, patterns: Patterns, grid: Grid) -> dict[Mode, list[int]]:
    """Heads of every mode; one that leaves nothing out on this grid is full."""
    groups: dict[Mode, list[int]] = {}
    for head, mode in enumerate(chosen.modes):
        mode = "full" if mode_density(mode, patterns, grid) == 1 else mode
        groups.setdefault(mode, []).append(head)
    return groups


def _slice(heads: list[int]) -> slice | list[int]:
    """Heads that stand together are no copy."""
    return slice(heads[0], heads[-1] + 1) if heads[-1] - heads[0] + 1 == len(heads) else heads


def search_sparse_plan(
    pipe: Any,
    prompts: Sequence[Any],
    modes: Sequence[Mode] = SPARSE,
    eps: float | None = None,
    target: float | None = None,
    patterns: Patterns | None = None,
    measured_columns: bool = False,
    every: int = 1,
    queries: float = 1.0,
    first_seed: int = 0,
    starts: Sequence[float] = (0.0,),
    **settings: Any,
) -> HeadPlan:
    """Draws a few prompts densely and finds the plan of their losses.

    Args:
        pipe: a diffusers pipeline.
        prompts: first arguments of the pipeline, drawn one by one; 8 to 16 say enough about others.
        modes: sparse ones that heads may take.
        eps: threshold on the losses.
        target: mean share of full attention instead.
        patterns: widths of the modes.
        measured_columns: whether stripes stand where most attention goes, which a run before measures.
        every: measures one step in so many.
        queries: share of the image's queries that is measured.
        first_seed: of the first prompt's noise; the others follow.
        starts: shares of the run at which groups of steps begin.
        settings: further arguments of the pipeline, such as num_inference_steps.

    Raises:
        UserError: no prompts, or as in `find_plan` and `record_losses`.
    """
    if not prompts:
        raise UserError("got no prompts to search on; give about 8")

    def draw() -> None:
        for seed, prompt in enumerate(prompts, first_seed):
            pipe(prompt, generator=generators_for([seed])[0], output_type="latent", **settings)

    cells = record_columns(pipe, draw, patterns, every, queries) if measured_columns else None
    losses = record_losses(pipe, draw, patterns, modes, every, queries, cells)
    return find_plan(losses, eps, target, starts=starts)
