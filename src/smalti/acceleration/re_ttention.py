"""Re-ttention: attention to very few keys, put right by what an earlier full step knew of the others.

Over a local mask M the softmax has too small a denominator, so every kept key counts too much. A full step stores, for
each query and head, the share that the mask holds, and what the scaled sparse result lacks:

    rho = exp(lse_M - lse_all),   R = full - rho * sparse,   both of the same step;

the steps up to the next full one give `rho * sparse + R`, and rho grows by `drift` with each of them, up to 1. The
first `full_steps` steps are full, then one in `period`. Text is always attended; its own queries attend to everything.

`correction` "rho", "residual" (sparse + R with R = full - sparse), "none" and "reuse" (the full step's output, and no
attention at all) are what the paper compares with.

Source: Re-ttention (arXiv 2505.22918), section 4. Differences: R is taken before the projection of the output, which
is linear, so it is the same up to rounding and the bias needs no care; the mask is made of runs of tokens that are
moved inwards at the ends (`ops.local_mask`); steps are those of the run, not a counter of the layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.method import CoreCall, CoreMethod
from smalti.core.protocols import TokenLayout
from smalti.ops.attention import attention_with_lse
from smalti.ops.block_mask import block_attention, block_attention_with_lse, choose, sparse_cost
from smalti.ops.local_mask import MASKS, Mask, attended, local_layout
from smalti.ops.lse_merge import mass
from smalti.seams.image_attention import check_image_grid, image_grid, keys_alone
from smalti.seams.schedule import is_early

Correction = Literal["both", "rho", "residual", "none", "reuse"]
CORRECTIONS = ("both", "rho", "residual", "none", "reuse")


@dataclass(frozen=True)
class Kept:
    """What one attention keeps of its last full step.

    Args:
        step: of the full pass.
        rho: share of the softmax that the mask held (B, h, N, 1), float32; None = not used.
        residual: what the sparse result lacked (B, h, N, d), or the whole output where nothing is computed anew.
    """

    step: int
    rho: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True)
class ReTtention(CoreMethod):
    """Sparse attention among image tokens with the statistics of the last full step.

    Args:
        density: share of image keys that a query attends to, in (0, 1]; 1 changes nothing.
        full_steps: steps at the beginning that are full.
        period: one step in so many is full from then on.
        drift: lambda in the paper: what rho grows by with every sparse step.
        mask: band (of the flattened order), window (of rows and columns) or frames (a band in every frame).
        correction: both, or a part of it: rho, residual, none, reuse.
        cross: also hold the output of cross-attention to text from one full step to the next: there the mask keeps no
            key, so rho is 0 and R is all.

    Raises:
        UserError: a value is out of range.
    """

    density: float = 0.031
    full_steps: int = 5
    period: int = 5
    drift: float = 0.04
    mask: Mask = "band"
    correction: Correction = "both"
    cross: bool = False

    owns = frozenset({"attention pattern"})
    work = "less"

    def __post_init__(self):
        if not 0 < self.density <= 1 or self.full_steps < 0 or self.period < 1 or self.drift < 0:
            raise UserError(
                f"ReTtention got density={self.density}, full_steps={self.full_steps}, period={self.period}, "
                f"drift={self.drift}; give a density in (0, 1], full steps and drift from 0, a period from 1"
            )
        if self.mask not in MASKS:
            raise unknown_name("mask of ReTtention", self.mask, MASKS)
        if self.correction not in CORRECTIONS:
            raise unknown_name("correction of ReTtention", self.correction, CORRECTIONS)

    @classmethod
    def neutral(cls) -> Self:
        return cls(density=1.0)

    @classmethod
    def active(cls) -> Self:
        return cls(density=0.1, full_steps=1, period=11)

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (
            cls(density=0.1, full_steps=1, period=11, mask="window", cross=True),
            cls(density=0.1, full_steps=0, period=12, mask="frames", correction="residual"),
            cls(density=0.1, full_steps=2, period=10, correction="none"),
        )

    @classmethod
    def candidates(cls, steps: int, speedup: float) -> "tuple[Self, ...]":
        return tuple(
            cls(density, full_steps=max(1, steps // 10), period=period, mask=mask)
            for density in (0.031, 0.1, 0.25)
            for period in (5, 10)
            for mask in ("window", "band")
        )

    @property
    def is_neutral(self) -> bool:
        return self.density == 1 or self.period == 1

    def check_cores(self, model: str, cores: Mapping[str, tuple[TokenLayout, TokenLayout]]) -> None:
        check_image_grid(model, cores, "ReTtention")

    def idle_reason(self, evaluations: int) -> str:
        return (
            f"of {evaluations} evaluations those of the first {self.full_steps} steps and of one step in {self.period} "
            f"were full, or density {self.density} saves nothing on so few image tokens; take more steps, fewer full"
        )

    def init(self) -> dict[str, Kept]:
        return {}

    def kept(self, state: dict[str, Kept]) -> int:
        tensors = (one for kept in state.values() for one in (kept.rho, kept.residual) if one is not None)
        return sum(one.numel() * one.element_size() for one in tensors)

    def at_core(self, state: dict[str, Kept], call: CoreCall) -> Tensor:
        grid = image_grid(call.layout, call.key_layout)
        is_held = self.correction == "reuse" if grid else self.cross and _is_cross(call)
        if self.is_neutral or not (grid or is_held) or is_early(call.moment, self.full_steps):
            return call.attend(call.q, call.k, call.v, call.mask)
        key = f"{call.site}#{call.site.occurrence}"
        is_full = key not in state or (call.moment.step - self.full_steps) % self.period == 0
        if is_held:
            return self._hold(state, key, call, is_full)
        assert grid is not None
        image = call.layout.span("image")
        layout = local_layout(grid, self.mask, self.density, image.start, len(call.layout) - image.stop)
        if sparse_cost(layout) >= 1 - 1 / self.period:  # a full step computes the sparse result, too
            return call.attend(call.q, call.k, call.v, call.mask)
        keys = keys_alone(call.mask, str(call.site))
        backend = choose(layout, call.q.device) if keys is None else "gather"
        sparse = (call.q, call.k, call.v, layout, keys, call.scale, backend)
        if is_full:
            out, state[key] = self._full(call, keys, layout.image, sparse)
            return out
        call.note(f"{backend}, {attended(layout):.1%} of image keys")
        return self._correct(block_attention(*sparse), state[key], call.moment.step, layout.image)

    def _hold(self, state: dict[str, Kept], key: str, call: CoreCall, is_full: bool) -> Tensor:
        """The full step's output, as long as it is kept."""
        if is_full:
            state[key] = Kept(call.moment.step, residual=call.attend(call.q, call.k, call.v, call.mask))
        else:
            call.note("held")
        held = state[key].residual
        assert held is not None
        return held

    def _full(self, call: CoreCall, keys: Tensor | None, image: slice, sparse: tuple[Any, ...]) -> tuple[Tensor, Kept]:
        """A full pass, and what a sparse pass of the same step (its arguments) says of it."""
        step, rho = call.moment.step, None
        if self.correction in ("both", "rho"):
            whole, some = (
                attention_with_lse(call.q, call.k, call.v, keys, call.scale),
                block_attention_with_lse(*sparse),
            )
            rho = mass(some, whole)[:, :, image, None].clamp(max=1)
            out, scaled = whole.out, rho * some.out[:, :, image]
        else:
            out = call.attend(call.q, call.k, call.v, call.mask)
            scaled = None if self.correction == "none" else block_attention(*sparse)[:, :, image]
        if scaled is None or self.correction == "rho":
            return out, Kept(step, rho)
        return out, Kept(step, rho, (out[:, :, image] - scaled).to(out.dtype))

    def _correct(self, out: Tensor, kept: Kept, step: int, image: slice) -> Tensor:
        """`rho * sparse + R` for the image tokens of a sparse result (B, h, L, d); the sum is in float32."""
        tokens = out[:, :, image]
        if kept.rho is not None:
            tokens = tokens * (kept.rho + self.drift * max(0, step - kept.step - 1)).clamp(max=1)
        if kept.residual is not None:
            tokens = tokens + kept.residual
        out[:, :, image] = tokens
        return out


def _is_cross(call: CoreCall) -> bool:
    """Whether image tokens attend to text alone."""
    kinds = [{one.kind for one in layout.segments} for layout in (call.layout, call.key_layout)]
    return kinds == [{"image"}, {"text"}]
