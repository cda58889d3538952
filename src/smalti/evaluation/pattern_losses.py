"""What every mode costs the output of every head, measured on the dense trajectory of a few prompts.

While the model runs, each attention among image tokens is computed once as it is, which is what the model gets, and
once in every mode; kept are `MSE(O_i, O_0)` and the mean square of O_0 for each attention, step and head. Nothing of
the size of a map is held. With `queries` below 1 some of the image's queries are measured, against masks of their rows.

Columns of `stripes` may be those that receive most attention; a run before the first measures them.

Source: Sparse-vDiT (arXiv 2506.03065), section 4.2: losses are of outputs, not of maps.
Shapes: B batch, h heads, L tokens, N of the image, T recorded steps, s queries, m sparse modes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.core.errors import Refusal, UserError
from smalti.core.method import CoreCall, CoreMethod, Reading, Site
from smalti.ops.head_patterns import Mode, Patterns, allowed_keys, best_cells, mode_attention, stripe_columns
from smalti.ops.token_order import Grid
from smalti.seams.apply import apply
from smalti.seams.image_attention import image_grid, keys_alone
from smalti.seams.layout import core_name

SPARSE: tuple[Mode, ...] = ("skip", "diagonal", "multi-diagonal", "stripes")
Cells = tuple[tuple[int, ...], ...]
"""For every head of an attention the cells of its columns."""
ROWS = 1024
"""Queries whose scores are held at a time while received attention is measured."""


def site_name(site: Site) -> str:
    """The name of an attention in losses and plans."""
    return core_name(str(site), site.occurrence)


@dataclass(frozen=True)
class HeadLosses:
    """Losses of modes, as sums over samples.

    Args:
        model: class name.
        grid: (F, H, W) of the image tokens.
        patterns: widths of the modes.
        modes: the sparse modes that were tried (m).
        planned: steps of the run.
        steps: those that were recorded (T).
        samples: how many the sums are over; of guidance each branch is one.
        errors: `MSE(O_i, O_0)` by attention (T, h, m), float64.
        energy: mean square of O_0 (T, h).
        cells: of the stripes, by attention; empty = the lattice.
    """

    model: str
    grid: Grid
    patterns: Patterns
    modes: tuple[Mode, ...]
    planned: int
    steps: tuple[int, ...]
    samples: int
    errors: Mapping[str, Tensor]
    energy: Mapping[str, Tensor]
    cells: Mapping[str, Cells] = field(default_factory=dict)

    def joined(self, other: "HeadLosses") -> "HeadLosses":
        """The losses of both sets of prompts together.

        Raises:
            UserError: they were not measured alike.
        """
        alike = ("model", "grid", "patterns", "modes", "planned", "steps", "cells")
        differing = [name for name in alike if getattr(self, name) != getattr(other, name)]
        if differing:
            raise UserError(f"losses that differ in {', '.join(differing)} cannot be joined; record both alike")
        errors, energy = (
            {name: one[name] + both[name] for name in one}
            for one, both in ((self.errors, other.errors), (self.energy, other.energy))
        )
        return HeadLosses(
            self.model, self.grid, self.patterns, self.modes, self.planned, self.steps,
            self.samples + other.samples, errors, energy, self.cells,
        )  # fmt: skip


def record_losses(
    target: Any,
    draw: Callable[[], object],
    patterns: Patterns | None = None,
    modes: Sequence[Mode] = SPARSE,
    every: int = 1,
    queries: float = 1.0,
    cells: Mapping[str, Cells] | None = None,
) -> HeadLosses:
    """Losses of all modes while a model runs densely.

    Args:
        target: pipeline or model.
        draw: runs it, once or for one prompt after another.
        patterns: widths.
        modes: the sparse ones that are tried.
        every: records one step in so many.
        queries: share of the image's queries that is measured, in (0, 1].
        cells: of `record_columns`, for measured stripes.

    Raises:
        UserError: nothing was recorded, or a setting out of range.
    """
    if not modes or not set(modes) <= set(SPARSE):
        raise UserError(f"got the modes {list(modes)}; give some of {', '.join(SPARSE)}")
    widths, known = patterns or Patterns(), dict(cells or {})
    sums: dict[tuple[str, int], Any] = {}  # errors, energy and samples of an attention at a step

    def look(call: CoreCall, grid: Grid, out: Tensor, chosen: Tensor | None) -> None:
        name = site_name(call.site)
        columns = stripe_columns(grid, widths.stripes, known[name]) if name in known else None
        image = call.layout.span("image").start
        dense = out if chosen is None else out[:, :, chosen + image]
        given = [_mode_output(call, grid, mode, widths, columns, chosen) for mode in modes]
        errors = torch.stack([_mean_square(one - dense) for one in given], dim=-1)  # (h, m)
        before = sums.get((name, call.moment.step), (0, 0, 0))
        found = (errors, _mean_square(dense), len(out))
        sums[name, call.moment.step] = tuple(one + more for one, more in zip(before, found, strict=True))

    recorder = _run(target, draw, _Recorder(look, every, queries))
    names, steps = list(dict.fromkeys(name for name, _ in sums)), tuple(sorted({step for _, step in sums}))
    errors, energy = (
        {name: torch.stack([sums[name, step][part] for step in steps]) for name in names} for part in (0, 1)
    )
    samples, used = next(iter(sums.values()))[2], {name: known[name] for name in names if name in known}
    (grid, planned), model = recorder.seen[0], recorder.models[0]
    return HeadLosses(model, grid, widths, tuple(modes), planned or steps[-1] + 1, steps, samples, errors, energy, used)


def record_columns(
    target: Any, draw: Callable[[], object], patterns: Patterns | None = None, every: int = 1, queries: float = 1.0
) -> dict[str, Cells]:
    """For each attention and head the cells of keys that receive most attention; arguments as in `record_losses`."""
    received: dict[str, Tensor] = {}

    def look(call: CoreCall, grid: Grid, out: Tensor, chosen: Tensor | None) -> None:
        name, image = site_name(call.site), call.layout.span("image")
        asking = call.q[:, :, image] if chosen is None else call.q[:, :, chosen + image.start]
        scale = 1 / math.sqrt(call.q.shape[-1]) if call.scale is None else call.scale
        mask = keys_alone(call.mask, str(call.site))
        for some in asking.split(ROWS, dim=2):
            scores = (some.float() * scale) @ call.k.float().transpose(-1, -2)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            received[name] = received.get(name, 0) + scores.softmax(-1)[..., image].sum((0, 2)).cpu()  # (h, N)

    grid, _ = _run(target, draw, _Recorder(look, every, queries)).seen[0]
    return {name: best_cells(one, grid, (patterns or Patterns()).stripes) for name, one in received.items()}


def _mode_output(
    call: CoreCall, grid: Grid, mode: Mode, patterns: Patterns, columns: Tensor | None, chosen: Tensor | None
) -> Tensor:
    """What a mode gives all heads of an attention, of all tokens (B, h, L, d) or of chosen ones of the image."""
    image, mask = call.layout.span("image"), keys_alone(call.mask, str(call.site))
    if chosen is None or mode == "skip":
        q = call.q if chosen is None else call.q[:, :, chosen + image.start]
        return mode_attention(q, call.k, call.v, mode, patterns, grid, image.start, mask, call.scale, columns)
    after = len(call.layout) - image.stop
    allowed = allowed_keys(chosen, mode, patterns, grid, image.start, after, columns)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        allowed = torch.zeros_like(allowed, dtype=mask.dtype).masked_fill(~allowed, -torch.inf) + mask
    asking = call.q[:, :, chosen + image.start]
    return F.scaled_dot_product_attention(asking, call.k, call.v, attn_mask=allowed, scale=call.scale)


def _mean_square(x: Tensor) -> Tensor:
    """Of every head, summed over samples: (B, h, L, d) -> (h,), float64 on the CPU."""
    return x.float().square().mean((2, 3)).double().sum(0).cpu()


Look = Callable[[CoreCall, Grid, Tensor, Tensor | None], None]
"""Takes what is wanted from an attention: the call, its grid and output, and the chosen queries, None = all."""


@dataclass(frozen=True, eq=False)
class _Recorder(CoreMethod):
    """Looks at attention and changes nothing."""

    look: Look
    every: int
    queries: float
    models: list[str] = field(default_factory=list)
    seen: list[tuple[Grid, int | None]] = field(default_factory=list)

    order = 1_000
    """Innermost: what other methods hand on is seen."""

    def __post_init__(self):
        if self.every < 1 or not 0 < self.queries <= 1:
            raise UserError(f"got every={self.every}, queries={self.queries}; give at least 1 and a share in (0, 1]")

    @classmethod
    def neutral(cls) -> Self:
        return cls(lambda *_: None, 1, 1.0)

    @classmethod
    def active(cls) -> Self:
        return cls.neutral()

    @property
    def is_neutral(self) -> bool:
        return True

    def check(self, reading: Reading) -> None:
        if self.models:
            raise Refusal(f"got two denoisers, {self.models[0]} and {reading.model}; record them one at a time")
        self.models.append(reading.model)

    def at_core(self, state: None, call: CoreCall) -> Tensor:
        out = call.attend(call.q, call.k, call.v, call.mask)
        grid = image_grid(call.layout, call.key_layout)
        if grid is not None and call.moment.step % self.every == 0:
            self.seen.append((grid, call.moment.steps))
            self.look(call, grid, out, self._chosen(grid, call))
        return out

    def _chosen(self, grid: Grid, call: CoreCall) -> Tensor | None:
        """The image's queries that are measured (s,), others at every step; None = all."""
        if self.queries == 1:
            return None
        tokens = math.prod(grid)
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(call.moment.step))
        return order[: math.ceil(self.queries * tokens)].sort().values.to(call.q.device)


def _run(target: Any, draw: Callable[[], object], recorder: _Recorder) -> _Recorder:
    with apply(target, recorder) as handle, torch.no_grad():
        draw()
        handle.remove(check=False)
    kinds = set(recorder.seen)
    if len(kinds) != 1:
        raise UserError(
            f"recorded grids and steps {sorted(map(str, kinds)) or 'none'}; draw with one size and "
            "one number of steps, on a model with attention among image tokens"
        )
    return recorder
