"""From losses of modes to a plan: the published rule, and a threshold that meets a wanted density.

For every head and sparse mode i, the mean over steps of the error and the price of what is computed:

    L_i = MSE(O_i, O_0) + weight * (1 - S_i);   full if all L_i > eps, else the mode with the smallest L_i

(weight: lambda in the paper). Full attention has no loss of its own in this comparison. The MSE depends on the scale of
values, so that an eps serves one model; by default it is divided by the mean square of O_0 over the heads of the
attention, which keeps small heads cheap to change. `target` finds eps by bisection. At weight 0 nothing is gained by
leaving blocks out, and all heads stay full.

Source: Sparse-vDiT (arXiv 2506.03065), section 4.2. Differences: normalisation, measured seconds in the place of 1 - S.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from smalti.acceleration.head_plan import HeadPlan, SiteModes, StepGroup
from smalti.core.errors import UserError, unknown_name
from smalti.evaluation.pattern_losses import HeadLosses
from smalti.ops.head_patterns import MODES, Mode, mode_density

Scale = Literal["attention", "head", "raw"]
HALVINGS = 50


def find_plan(
    losses: HeadLosses,
    eps: float | None = None,
    target: float | None = None,
    weight: float = 0.5,
    scale: Scale = "attention",
    starts: Sequence[float] = (0.0,),
    costs: Mapping[Mode, float] | None = None,
) -> HeadPlan:
    """The plan of recorded losses.

    Args:
        losses: of `record_losses`.
        eps: threshold.
        target: mean cost of a head over the run instead, 1 = full attention: the smallest eps that costs no more.
        weight: lambda: what a cost of 1 weighs beside the error.
        scale: what the squared error is divided by: mean square of all heads of the attention, of the head, or nothing.
        starts: shares of the run at which groups of steps begin; before the first all heads are full.
        costs: of the modes, 1 = full attention; None = the share of blocks, 1 - S. See `mode_times`.

    Raises:
        UserError: not one of eps and target, or a target out of reach.
    """
    if (eps is None) == (target is None) or weight < 0:
        raise UserError(f"got eps={eps}, target={target}, weight={weight}; give one of eps and target, a weight from 0")
    if scale not in get_args(Scale):
        raise unknown_name("scale of losses", scale, get_args(Scale))
    priced: dict[Mode, float] = {mode: mode_density(mode, losses.patterns, losses.grid) for mode in MODES}
    priced |= costs or {}
    total = _totals(losses, weight, scale, starts, priced)

    def plan(threshold: float) -> HeadPlan:
        groups = tuple(
            StepGroup(start, tuple(_choose(name, one[index], threshold, weight, losses) for name, one in total.items()))
            for index, start in enumerate(starts)
        )
        return HeadPlan(groups, ("full",), losses.patterns, losses.model, losses.grid, threshold)

    if eps is not None:
        return plan(eps)
    assert target is not None
    lengths = [end - start for start, end in pairwise([*starts, 1.0])]
    prices = torch.tensor([priced[mode] for mode in losses.modes], dtype=torch.float64)
    return plan(_threshold(target, total, lengths, prices, priced["full"]))


def _totals(
    losses: HeadLosses, weight: float, scale: Scale, starts: Sequence[float], costs: Mapping[Mode, float]
) -> dict[str, Tensor]:
    """L of every attention (groups, h, m)."""
    members = [
        [index for index, step in enumerate(losses.steps) if start * losses.planned <= step < end * losses.planned]
        for start, end in pairwise([*starts, 1.0])
    ]
    if not all(members):
        raise UserError(f"no recorded step in a group that starts at one of {list(starts)}; record more steps")
    price = weight * torch.tensor([costs[mode] for mode in losses.modes])
    total = {}
    for name, errors in losses.errors.items():
        energy = losses.energy[name]  # (T, h)
        unit = {"attention": energy.mean(1, keepdim=True), "head": energy}.get(scale, torch.tensor(losses.samples))
        shares = errors / unit.clamp_min(1e-30)[..., None]
        total[name] = torch.stack([shares[some].mean(0) for some in members]) + price
    return total


def _choose(name: str, total: Tensor, eps: float, weight: float, losses: HeadLosses) -> SiteModes:
    """The rule, for all heads of an attention (h, m)."""
    best = total.min(1)
    is_sparse = (best.values <= eps) & (weight > 0)
    modes: tuple[Mode, ...] = tuple(
        losses.modes[int(mode)] if sparse else "full" for mode, sparse in zip(best.indices, is_sparse, strict=True)
    )
    return SiteModes(name, modes, tuple(round(float(one), 6) for one in best.values), losses.cells.get(name, ()))


def _threshold(
    target: float, total: Mapping[str, Tensor], lengths: Sequence[float], prices: Tensor, full: float
) -> float:
    """The smallest eps whose mean cost is at most the target, by bisection: the cost falls with eps.

    Args:
        target: mean cost of a head.
        total: L of every attention (groups, h, m).
        lengths: shares of the run that the groups of steps have; what is missing from 1 is full.
        prices: costs of the sparse modes (m,).
        full: cost of full attention.
    """
    best = torch.cat([one.min(2).values for one in total.values()], dim=1)  # (groups, heads of all attentions)
    cheap = prices[torch.cat([one.min(2).indices for one in total.values()], dim=1)]

    def cost(eps: float) -> float:
        means = torch.where(best <= eps, cheap, full).mean(1)
        return (1 - sum(lengths)) * full + float(torch.tensor(lengths, dtype=torch.float64) @ means)

    low, high = 0.0, float(best.max())
    if cost(high) > target:
        raise UserError(f"the sparsest plan costs {cost(high):.3f} of full attention, above {target}; ask for more")
    if cost(low) <= target:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high
