"""Optimizers of a training: AdamW alone, or Muon on the matrices of the blocks with AdamW on everything else.

Muon replaces the momentum of a matrix by its nearest semi-orthogonal matrix (five Newton-Schulz steps), so that every
direction of the update has equal size. Vectors, embeddings and the first and last projections stay with AdamW. Muon's
updates are scaled by `0.2 * sqrt(max(rows, columns))`, which gives them AdamW's size: both may use one learning rate.

Source: Muon, kellerjordan.github.io/posts/muon; scaling, arXiv 2502.16982, eq. 4; `torch.optim.Muon`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smalti.training.config import TrainConfig
from smalti.training.sharding import like, local


class Factors(NamedTuple):
    """What a parameter's rate and decay are multiplied by."""

    rate: float = 1.0
    decay: float = 1.0


class Optimizers:
    """All optimizers of one model, stepped together.

    Args:
        model: its trainable parameters are optimised.
        config: optimizer, rates, decay and betas.
        factors: on the rates and decays of parameters by name, such as muP's; 1 for those that are not named.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, factors: Mapping[str, Factors] | None = None):
        self.config, self.factors = config, dict(factors or {})
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        muon = block_matrices(model) if config.optimizer == "muon" else []
        chosen = set(muon)
        rest = [parameter for parameter in self.names if parameter not in chosen]
        embedded = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        decayed = [parameter for parameter in rest if parameter.ndim > 1 and parameter not in embedded]
        plain = [parameter for parameter in rest if parameter.ndim <= 1 or parameter in embedded]
        groups = [*self._grouped(decayed, config.weight_decay), *self._grouped(plain, 0.0)]
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in self.names)
        self.parts: list[torch.optim.Optimizer] = (
            [torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)] if rest else []
        )
        self.peaks = [config.learning_rate] * len(self.parts)
        if muon:
            peak = config.muon_rate or config.learning_rate
            self.parts.append(
                torch.optim.Muon(
                    self._grouped(muon, config.weight_decay), lr=peak, weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )  # fmt: skip
            self.peaks.append(peak)

    def _grouped(self, parameters: Sequence[Tensor], decay: float) -> list[dict[str, Any]]:
        """Parameters by their factors; those in pieces and those that are whole cannot be updated in one call."""
        found: dict[tuple[Factors, bool], list[Tensor]] = {}
        for one in parameters:
            name = self.names[one].removeprefix("denoiser.")  # an aligned model's denoiser has its own names
            found.setdefault((self.factors.get(name, Factors()), local(one) is one), []).append(one)
        return [
            {"params": some, "weight_decay": decay * factors.decay, "factor": factors.rate}
            for (factors, _), some in found.items()
        ]

    def step(self, step: int) -> None:
        """One update with the rates of this step."""
        factor = self.config.rate(step)
        for part, peak in zip(self.parts, self.peaks):
            for group in part.param_groups:
                group["lr"] = peak * factor * group["factor"]
            part.step()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def flat_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state as tensors `parameter name/state name`, and what is no tensor under the same keys."""
        tensors, plain = {}, {}
        for part in self.parts:
            for parameter, state in part.state.items():
                for key, value in state.items():
                    store = tensors if isinstance(value, Tensor) else plain
                    store[f"{self.names[parameter]}/{key}"] = value
        return tensors, plain

    def load_flat_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Restores what `flat_state` gave; parameters without an entry start afresh."""
        entries: dict[str, dict[str, Any]] = {}
        for key, value in (*tensors.items(), *plain.items()):
            name, _, field = key.rpartition("/")
            entries.setdefault(name, {})[field] = value
        for part in self.parts:
            ordered = [parameter for group in part.param_groups for parameter in group["params"]]
            state = {
                i: {key: like(value, p) if isinstance(value, Tensor) else value for key, value in entry.items()}
                for i, p in enumerate(ordered)
                if (entry := entries.get(self.names[p])) is not None
            }
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


def block_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers inside the model's repeated blocks (the members of its `ModuleList`s)."""
    found: dict[Tensor, None] = {}
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for layer in stack.modules():
                if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                    found[layer.weight] = None
    return list(found)
