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
from torch.utils._pytree import tree_leaves

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
        beside: further arguments that are denoised with the sample (sound beside a picture), in the order of outputs.
        clocks: further arguments that hold the time.
        uses_time: False if the model takes the time and does nothing with it.
        is_kin: a near relative of another family: it is read and run by TaylorSeer, but takes no part in the contract
            of all methods, which would tell nothing new.
        refused: words of the reason with which the model is refused; such a family has no inputs.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, tuple[int, int]], dict[str, Any]] | None = None
    sample: str = "hidden_states"
    time: str = "timestep"
    scale: float = 1000.0
    beside: tuple[str, ...] = ()
    clocks: tuple[str, ...] = ()
    uses_time: bool = True
    is_kin: bool = False
    refused: str = ""


def all_families() -> dict[str, Family]:
    """Every family of this folder by name; also those that are refused."""
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))
    found: dict[str, Family] = {}
    for path in sorted(HERE.glob("family_*.py")):
        found |= importlib.import_module(path.stem).FAMILIES
    return found


def readable_families() -> dict[str, Family]:
    """Every family that is read."""
    return {name: one for name, one in all_families().items() if not one.refused}


def contract_families() -> dict[str, Family]:
    """The families on which every method must hold its contract."""
    return {name: one for name, one in readable_families().items() if not one.is_kin}


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


def tensors(output: Any) -> list[Tensor]:
    """All tensors of whatever a model returns, in its order."""
    return [one for one in tree_leaves(output) if isinstance(one, Tensor)]


def call(model: nn.Module, family: Family, arguments: dict[str, Any], t: float) -> list[Tensor]:
    """All predictions of a model at time t in [0, 1]."""
    times = {name: _at(arguments[name], t * family.scale) for name in (family.time, *family.clocks)}
    return tensors(model(**{**arguments, **times}))


@torch.no_grad()
def euler(
    model: nn.Module, family: Family, steps: int = 6, seed: int = 0, batch: int = 1, size: str = "small"
) -> Tensor:
    """The sample after an Euler loop from t = 1 to 0; of longer outputs the first channels or the last tokens count."""
    arguments = family.inputs(seed, batch, GRIDS[size])
    moving = (family.sample, *family.beside)
    for t, s in pairwise(torch.linspace(0.95, 0.05, steps + 1).tolist()):
        velocities = iter(call(model, family, arguments, t))
        for name in moving:
            x = arguments[name]
            if isinstance(x, Tensor):
                arguments[name] = x + (s - t) * _fit(next(velocities), x)
            else:
                arguments[name] = type(x)(one + (s - t) * _fit(next(velocities), one) for one in x)
    x = arguments[family.sample]
    return x if isinstance(x, Tensor) else torch.stack(list(x))


def _at(like: Any, time: float) -> Any:
    return torch.full_like(like, time) if isinstance(like, Tensor) else type(like)(time)


def _fit(velocity: Tensor, x: Tensor) -> Tensor:
    velocity = velocity.reshape(x.shape) if velocity.numel() == x.numel() else velocity
    for axis, length in enumerate(x.shape):
        missing = length - velocity.shape[axis]
        if missing > 0:  # what stands in further channels of the sample is no noise
            padding = [*velocity.shape[:axis], missing, *velocity.shape[axis + 1 :]]
            velocity = torch.cat([velocity, velocity.new_zeros(padding)], axis)
        start = velocity.shape[axis] - length if (axis, x.ndim) == (1, 3) else 0
        velocity = velocity.narrow(axis, start, length)
    return velocity
