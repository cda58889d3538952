"""Between a running training and its checkpoint: what is taken, and what is refused when it is put back."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.training.alignment import denoiser_of
from smalti.training.checkpoints import Checkpoint
from smalti.training.config import TrainConfig
from smalti.training.ema import EMA
from smalti.training.optimizers import Optimizers
from smalti.training.sharding import like, whole


@dataclass
class RunState:
    """What changes while a training runs.

    Args:
        model: the bare model.
        ema: its average, or None.
        optimizers: with their moments.
        step: finished steps.
        skipped: steps that were skipped for a non-finite loss or gradient.
        streak: how many of the latest steps were skipped in a row.
        best: the lowest held-out loss so far, kept with `best_weights` if the training ends on held-out losses.
        best_weights: the averaged weights that reached it.
        stale: held-out losses since then.
        stops: what the rules that stop losses remember; changed in place.
    """

    model: nn.Module
    ema: EMA | None
    optimizers: Optimizers
    step: int = 0
    skipped: int = 0
    streak: int = 0
    best: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0
    stops: list[dict[str, Any]] = field(default_factory=list)

    @property
    def averaged(self) -> nn.Module:
        """The averaged model; the trained one itself if nothing is averaged."""
        return denoiser_of(self.model) if self.ema is None else self.ema.model

    def judge(self, held_out_loss: float) -> None:
        """Keeps the averaged weights if their held-out loss is a new best, else counts."""
        if held_out_loss < self.best:
            self.best, self.stale = held_out_loss, 0
            self.best_weights = {name: tensor.detach().clone() for name, tensor in weights(self.averaged).items()}
        else:
            self.stale += 1

    def capture(self, identity: Mapping[str, Any], position: int) -> Checkpoint:
        """The checkpoint of this moment; `position` counts the samples drawn so far. Processes ask together."""
        tensors, plain = self.optimizers.flat_state()
        stored = {"model": weights(self.model), "optimizer": tensors}
        if self.ema is not None:
            stored["ema"] = weights(self.ema.model)
        if self.best_weights:
            stored["best"] = self.best_weights
        stored = {name: {key: whole(one) for key, one in some.items()} for name, some in stored.items()}
        stored["random"] = random_tensors()
        state = {
            "position": position,
            "skipped": self.skipped,
            "streak": self.streak,
            "held_out": {"best": self.best, "stale": self.stale} if self.best_weights else None,
            "stops": self.stops,
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "optimizer": plain,
            "random": random_state(),
            "identity": dict(identity),
        }
        return Checkpoint(self.step, stored, state)

    def restore(self, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
        """Puts a checkpoint back.

        Raises:
            UserError: it belongs to another training; nothing was changed then.
        """
        check_identity(checkpoint.state["identity"], identity)
        check_weights(checkpoint.tensors["model"], weights(self.model), "the checkpoint's model")
        if self.ema is not None:
            check_weights(checkpoint.tensors.get("ema", {}), weights(self.ema.model), "the checkpoint's averaged model")
            copy_weights(checkpoint.tensors["ema"], self.ema.model)
            self.ema.updates = checkpoint.state["ema_updates"]
        copy_weights(checkpoint.tensors["model"], self.model)
        self.optimizers.load_flat_state(dict(checkpoint.tensors["optimizer"]), checkpoint.state["optimizer"])
        if checkpoint.state.get("held_out") is not None:
            self.best, self.stale = checkpoint.state["held_out"]["best"], checkpoint.state["held_out"]["stale"]
            device = next(self.model.parameters()).device
            self.best_weights = {name: tensor.to(device) for name, tensor in checkpoint.tensors["best"].items()}
        for mine, stored in zip(self.stops, checkpoint.state.get("stops", [])):
            mine.update(stored)
        restore_random(checkpoint.tensors["random"], checkpoint.state["random"])
        self.step, self.skipped, self.streak = (
            checkpoint.step, checkpoint.state["skipped"], checkpoint.state["streak"],
        )  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied tensor is listed once."""
    unique = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in unique}


@torch.no_grad()
def copy_weights(stored: Mapping[str, Tensor], model: nn.Module) -> None:
    """Writes checked weights into a model."""
    for name, tensor in weights(model).items():
        tensor.copy_(like(stored[name], tensor))


def check_weights(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raises `UserError` unless names and shapes agree."""
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or extra:
        parts = [
            f"{len(names)} {kind} keys ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("extra", extra))
            if names
        ]
        raise UserError(f"{what} has {' and '.join(parts)}; resume with the model that it was saved from")
    for name, tensor in expected.items():
        if stored[name].shape != tensor.shape:
            got, wanted = tuple(stored[name].shape), tuple(tensor.shape)
            raise UserError(
                f"{what} has {name} of shape {got}, not {wanted}; resume with the model that it was saved from"
            )


def identity(
    model: nn.Module, objective: object, config: TrainConfig, description: Mapping[str, Any]
) -> dict[str, Any]:
    """What names a training, as json; a checkpoint with another identity is refused."""
    settings = plain(model.config) if isinstance(model, ConfigMixin) else {}
    public = {key: value for key, value in settings.items() if not key.startswith("_")}  # not versions and paths
    return {
        "config": config.identity(),
        "model": {"class": type(model).__qualname__, **public},
        "objective": plain(objective),
        "description": plain(description),
    }


def check_identity(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises `UserError` that names the first settings in which two trainings differ."""
    one, other = _leaves(stored), _leaves(current)
    differing = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if differing:
        shown = "; ".join(f"{key} was {one.get(key)!r}, is {other.get(key)!r}" for key in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"the checkpoint is of another training: {shown}{more}; use the same settings or another folder"
        )


def plain(value: Any) -> Any:
    """A json form of settings: dataclasses by class and fields, functions by name, other objects by class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__qualname__, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    return getattr(value, "__qualname__", type(value).__qualname__)


def random_tensors() -> dict[str, Tensor]:
    """States of torch's global generators."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def random_state() -> dict[str, Any]:
    """States of Python's and NumPy's global generators, as json."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }


def restore_random(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Puts all global generators back; CUDA's only for devices that are present."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        return {
            k: v for key, one in tree.items() for k, v in _leaves(one, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: list(tree) if isinstance(tree, tuple) else tree}
