"""How much the units of a model matter, by rules that need no training of masks; more is more important.

- `magnitude`: the L2 norm of all weights that belong to a unit.
- `taylor`: first order of what the loss would change by, `|sum of w * dL/dw|` over a unit's weights. A loss has a
  gradient of its own at every time; those far below the largest tell of noise alone and are left out (Diff-Pruning).
- `activation`: mean |activation| times the norm of the columns that read it; of modulation, mean |channel|.
- `chance`: random numbers, which every rule has to beat.

Sources: magnitude (arXiv 1608.08710); Taylor (arXiv 1906.10771, section 3) with the selection of times of Diff-Pruning
(arXiv 2305.10924); activation times norm (Wanda, arXiv 2306.11695, equation 1) for whole columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.seeds import derive_seed
from smalti.seams.units import UnitGroup

Scores = dict[str, Tensor]
"""Importance of every unit (count,), by the name of its group."""


@torch.no_grad()
def magnitude(model: nn.Module, groups: Sequence[UnitGroup]) -> Scores:
    """The L2 norm of a unit's weights."""
    return {group.name: _sums(model, group, lambda weight: weight.float().square()).sqrt() for group in groups}


def chance(groups: Sequence[UnitGroup], seed: int = 0) -> Scores:
    """Uniform numbers; a group's do not depend on which others there are."""
    return {
        group.name: torch.rand(
            group.count, generator=torch.Generator().manual_seed(derive_seed(seed, "chance", group.name))
        )
        for group in groups
    }


def taylor(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    losses: Sequence[Callable[[], Tensor]],
    threshold: float = 0.05,
) -> Scores:
    """What the loss would change by without a unit, to first order.

    Args:
        model: whose units they are.
        groups: of units.
        losses: each computes the loss of one batch at one time, with its graph.
        threshold: losses below this share of the largest are left out.

    Raises:
        UserError: no losses.
    """
    if not losses:
        raise UserError("got no losses to rank units by; give at least one, a function that computes it")
    with torch.no_grad():
        sizes = [float(loss()) for loss in losses]
    names = {place.path for group in groups for place in (*group.readers, *group.writers)}
    weights = {id(one): one for name in names for one in _layer(model, name).parameters(recurse=False)}
    required = {key: one.requires_grad for key, one in weights.items()}
    total = {key: torch.zeros_like(one) for key, one in weights.items()}
    try:
        for one in weights.values():
            one.requires_grad_(True)
        for loss, size in zip(losses, sizes, strict=True):
            if size >= threshold * max(sizes):
                with torch.enable_grad():
                    found = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True)
                for key, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        total[key] += gradient
    finally:
        for key, one in weights.items():
            one.requires_grad_(required[key])
    with torch.no_grad():
        return {
            group.name: _sums(model, group, lambda weight: weight.float() * total[id(weight)].float()).abs()
            for group in groups
        }


@torch.no_grad()
def activation(model: nn.Module, groups: Sequence[UnitGroup], run: Callable[[], object]) -> Scores:
    """Mean |activation| times the norm of the columns that read it, over all calls that `run` makes."""
    seen: dict[tuple[str, str], list[Tensor]] = {}

    def watch(group: UnitGroup, path: str, start: int) -> Any:
        def note(value: Tensor) -> None:
            part = value[..., start : start + group.count * group.size].detach().float()
            seen.setdefault((group.name, path), []).append(part.abs().flatten(0, -2).mean(0))

        layer = _layer(model, path)
        if group.readers:
            return layer.register_forward_pre_hook(lambda module, args: note(args[0]))
        return layer.register_forward_hook(lambda module, args, output: note(output))

    hooks = [watch(group, place.path, place.starts[0]) for group in groups for place in group.readers or group.writers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    scores: Scores = {}
    for group in groups:
        columns = 0
        for place in group.readers or group.writers:
            mean = torch.stack(seen[group.name, place.path]).mean(0)
            if group.readers:
                span = slice(place.starts[0], place.starts[0] + len(mean))
                mean = mean * _layer(model, place.path).weight[:, span].float().norm(dim=0)
            columns = columns + mean
        assert isinstance(columns, Tensor)
        scores[group.name] = columns.unflatten(0, (group.count, group.size)).sum(1)
    return scores


def _sums(model: nn.Module, group: UnitGroup, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Sums over each unit's weights and biases of a function of them (count,)."""
    total: Tensor | None = None
    for place in (*group.writers, *group.readers):
        layer = _layer(model, place.path)
        is_read = place in group.readers
        values = of(layer.weight).sum(0 if is_read else 1)
        if not is_read and getattr(layer, "bias", None) is not None:
            values = values + of(layer.bias)
        for start in place.starts:
            part = values[start : start + group.count * group.size].unflatten(0, (group.count, group.size)).sum(1)
            total = part if total is None else total + part
    assert total is not None
    return total


def _layer(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)
