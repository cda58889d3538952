"""Coordinate check: whether what a model's layers give stays as large when the model grows wider.

The same few updates are made at several widths, and the mean size of every layer's output is written down after each.
Over log width its logarithm lies on a line: a slope near 0 means that the parametrisation holds there, a positive one
that wider models blow up, a negative one that they stop learning. Gates that start at zero hide mistakes in the first
step, so later ones count. A readout may grow for a few steps and flatten later.

Source: Tensor Programs V (arXiv 2203.03466), appendix D.1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[int], tuple[nn.Module, torch.optim.Optimizer]]


@dataclass(frozen=True)
class Coordinates:
    """Mean absolute outputs: `sizes[layer][step][width]`, the steps from 0, before any update."""

    sizes: Mapping[str, Sequence[Mapping[int, float]]] = field(default_factory=dict)

    def slopes(self, step: int = -1) -> dict[str, float]:
        """Slope of log size over log width of every layer that gave anything, after so many updates."""
        return {name: slope(steps[step]) for name, steps in self.sizes.items() if min(steps[step].values()) > 0}

    def steepest(self, step: int = -1) -> tuple[str, float]:
        """The layer whose slope lies the farthest from 0, and its slope."""
        slopes = self.slopes(step)
        name = max(slopes, key=lambda one: abs(slopes[one]))
        return name, slopes[name]

    def is_flat(self, limit: float = 0.1, step: int = -1) -> bool:
        """Whether no slope lies further from 0 than `limit`."""
        return abs(self.steepest(step)[1]) < limit

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer, step and width, for plots and json."""
        return [
            {"layer": name, "step": step, "width": width, "size": size}
            for name, steps in self.sizes.items()
            for step, by_width in enumerate(steps)
            for width, size in by_width.items()
        ]


def coordinate_check(
    make: Make, loss: Callable[[nn.Module, int], Tensor], widths: Sequence[int], steps: int = 4, seeds: int = 1
) -> Coordinates:
    """Trains a few steps at every width and writes down how large the layers' outputs are.

    Args:
        make: a fresh model of a width and its optimizer; torch's seed is set before.
        loss: of a model at a step; the same samples at every width.
        widths: at least two.
        steps: updates.
        seeds: runs that are averaged.
    """
    sums: dict[str, list[dict[int, float]]] = {}
    for width in widths:
        for seed in range(seeds):
            torch.manual_seed(seed)
            model, optimizer = make(width)
            for step in range(steps + 1):
                for name, size in _outputs(model, lambda step=step, model=model: loss(model, step)).items():
                    by_width = sums.setdefault(name, [{} for _ in range(steps + 1)])[step]
                    by_width[width] = by_width.get(width, 0.0) + size / seeds
                optimizer.step()
                optimizer.zero_grad()
    return Coordinates(sums)


def slope(sizes: Mapping[int, float]) -> float:
    """Least-squares slope of log size over log width."""
    x = [math.log(width) for width in sizes]
    y = [math.log(size) for size in sizes.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True))
    return rise / sum((one - mean_x) ** 2 for one in x)


def _outputs(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Mean absolute outputs of all layers with weights of their own in one call; leaves its gradient."""
    sizes: dict[str, float] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                sizes[name] = float(output.detach().float().abs().mean())

        return hook

    layers = [(name, one) for name, one in model.named_modules() if any(True for _ in one.parameters(recurse=False))]
    hooks = [one.register_forward_hook(note(name)) for name, one in layers]
    try:
        loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return sizes
