"""Tiny random models of every family, found by listing this folder, and a plain loop around each."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
TEXT, GRIDS = 5, {"small": (4, 6), "large": (6, 8)}


@dataclass(frozen=True)
class Family:
    """One class of transformer.

    Args:
        build: makes the model; its weights are drawn afterwards.
        inputs: `(seed, batch, grid)` to the arguments of its forward; grid is (rows, columns) of image tokens.
        sample: name of the argument that holds the noisy sample.
        time: name of the argument that holds the time.
        scale: of the time: 1000 for most.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, tuple[int, int]], dict[str, Any]]
    sample: str = "hidden_states"
    time: str = "timestep"
    scale: float = 1000.0


def all_families() -> dict[str, Family]:
    """Every family of this folder by name."""
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))
    found: dict[str, Family] = {}
    for path in sorted(HERE.glob("family_*.py")):
        found |= importlib.import_module(path.stem).FAMILIES
    return found


def build(family: Family) -> nn.Module:
    """A model whose every weight is random: gates and outputs that start at zero would hide everything."""
    torch.manual_seed(0)
    model = family.build()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        center = 1.0 if "norm" in name and parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.data.copy_(center + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def draw(*shape: int, seed: int) -> Tensor:
    """Normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prediction(output: Any) -> Tensor:
    """The first tensor of whatever a model returns."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def call(model: nn.Module, family: Family, arguments: dict[str, Any], x: Any, t: float) -> Tensor:
    """The model at time t in [0, 1]."""
    like = arguments[family.time]
    time: Any = torch.full_like(like, t * family.scale) if isinstance(like, Tensor) else type(like)(t * family.scale)
    return prediction(model(**{**arguments, family.sample: x, family.time: time}))


@torch.no_grad()
def euler(
    model: nn.Module, family: Family, steps: int = 6, seed: int = 0, batch: int = 1, size: str = "small"
) -> Tensor:
    """The sample after an Euler loop from t = 1 to 0; outputs with more channels than the sample are cut."""
    arguments = family.inputs(seed, batch, GRIDS[size])
    x = arguments[family.sample]
    for t, s in pairwise(torch.linspace(0.95, 0.05, steps + 1).tolist()):
        velocity = call(model, family, arguments, x, t)
        if isinstance(x, Tensor):
            x = x + (s - t) * _fit(velocity, x)
        else:
            x = type(x)(one + (s - t) * _fit(velocity.reshape(-1, *one.shape)[0], one) for one in x)
    return x if isinstance(x, Tensor) else torch.stack(list(x))


def _fit(velocity: Tensor, x: Tensor) -> Tensor:
    for axis, length in enumerate(x.shape):
        velocity = velocity.narrow(axis, 0, length) if velocity.shape[axis] > length else velocity
    return velocity
