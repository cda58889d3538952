"""Which units of a model stay: chosen from scores, kept in a file, shown layer by layer.

Within a layer the units of lowest score go, the same share of each layer (local); or those of lowest score anywhere
(global). Scores of heads, neurons and modulation channels have scales of their own, so the global order is by rank: a
unit's place among all of its kind, from 0 to 1. Every layer keeps a head and a neuron.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smalti.core.errors import UserError, unknown_name
from smalti.core.files import atomic_folder, read_json, write_json
from smalti.seams.units import UnitGroup, read_units

Scope = Literal["global", "local"]
SCOPES = ("global", "local")
FACTS, TENSORS = "plan.json", "plan.safetensors"


@dataclass(frozen=True)
class MaskPlan:
    """What stays of a model.

    Args:
        model: class name.
        groups: the units, as they were read.
        keep: which stay (count,) bool, by the name of their group.
        scores: by which they were chosen (count,), by the name of their group.
        weights: parameters of one unit, by the name of its group.
    """

    model: str
    groups: tuple[UnitGroup, ...]
    keep: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    weights: Mapping[str, int]

    @property
    def masks(self) -> dict[str, Tensor]:
        """The same as numbers 0 and 1."""
        return {name: keep.float() for name, keep in self.keep.items()}

    @property
    def removed(self) -> float:
        """Share of the parameters of all units that goes."""
        total = sum(self.weights[group.name] * group.count for group in self.groups)
        gone = sum(self.weights[group.name] * int((~self.keep[group.name]).sum()) for group in self.groups)
        return gone / total

    def sparsity(self) -> dict[str, float]:
        """Share of units that go, by group."""
        return {group.name: 1 - float(self.keep[group.name].float().mean()) for group in self.groups}

    def table(self) -> str:
        """Units that stay and go in every layer, with a bar for the share that goes."""
        width = max(len(group.name) for group in self.groups)
        lines = [f"{self.model}: {self.removed:.1%} of the parameters of {len(self.groups)} groups of units go"]
        for group in self.groups:
            kept, share = int(self.keep[group.name].sum()), self.sparsity()[group.name]
            bar = "#" * round(20 * share)
            lines.append(
                f"  {group.name:{width}} {group.kind:5} {kept:6} of {group.count:6} {share:6.1%} {bar}".rstrip()
            )
        return "\n".join(lines)

    def save(self, folder: Path | str) -> Path:
        """Writes `plan.json` and `plan.safetensors` into a folder, which takes the place of what is there."""
        with atomic_folder(folder) as temporary:
            groups = [{"name": one.name, "kind": one.kind, "count": one.count} for one in self.groups]
            write_json(temporary / FACTS, {"model": self.model, "removed": self.removed, "groups": groups})
            tensors = {f"keep/{name}": keep.to(torch.uint8).cpu() for name, keep in self.keep.items()}
            tensors |= {f"scores/{name}": one.float().cpu() for name, one in self.scores.items()}
            save_file(tensors, temporary / TENSORS)
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str, model: nn.Module) -> Self:
        """Reads a plan for a model with the units that it was made for.

        Raises:
            UserError: the folder holds no plan, or that of another model.
        """
        path = Path(folder)
        facts = read_json(path / FACTS)
        try:
            tensors = load_file(path / TENSORS)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {path / TENSORS}: {error}") from error
        kinds = list(dict.fromkeys(fact["kind"] for fact in facts["groups"]))
        known = {group.name: group for group in read_units(model, kinds)}
        for fact in facts["groups"]:
            group = known.get(fact["name"])
            if facts["model"] != type(model).__name__ or group is None or group.count != fact["count"]:
                raise UserError(
                    f"{path} was made for a {facts['model']} with {fact['count']} {fact['kind']} in {fact['name']}, "
                    f"and this {type(model).__name__} has {group.count if group else 'none'}; load the model it names"
                )
        chosen = tuple(known[fact["name"]] for fact in facts["groups"])
        keep = {group.name: tensors[f"keep/{group.name}"].bool() for group in chosen}
        scores = {group.name: tensors[f"scores/{group.name}"] for group in chosen}
        return cls(facts["model"], chosen, keep, scores, {one.name: one.parameters(model) for one in chosen})


def make_plan(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    scores: Mapping[str, Tensor],
    ratio: float = 0.2,
    scope: Scope = "local",
    multiple: int = 1,
) -> MaskPlan:
    """Chooses the units of lowest score.

    Args:
        model: the transformer.
        groups: its units.
        scores: of each unit (count,); the higher, the longer it stays.
        ratio: share of the units' parameters that goes (global), or of the units of each layer, rounded (local).
        scope: global or local.
        multiple: the neurons that stay in a layer are a multiple of this, if it has so many (local); 64 suits a GPU.

    Raises:
        UserError: the ratio is not within (0, 1), or the scope is unknown.
    """
    if not 0 < ratio < 1:
        raise UserError(f"got a ratio of {ratio}; choose a share of the units that goes, between 0 and 1")
    if scope not in SCOPES:
        raise unknown_name("scope", scope, SCOPES)
    scores = {group.name: scores[group.name].detach().float().cpu() for group in groups}
    weights = {group.name: group.parameters(model) for group in groups}
    keep = _local(groups, scores, ratio, multiple) if scope == "local" else _global(groups, scores, ratio, weights)
    return MaskPlan(type(model).__name__, tuple(groups), keep, scores, weights)


def plan_below(
    model: nn.Module, groups: Sequence[UnitGroup], scores: Mapping[str, Tensor], threshold: float = 0.0
) -> MaskPlan:
    """All units with a score of at most the threshold go; logits of 0 are masks of a half."""
    scores = {group.name: scores[group.name].detach().float().cpu() for group in groups}
    keep = {}
    for group in groups:
        keep[group.name] = scores[group.name] > threshold
        if group.kind != "mod" and not bool(keep[group.name].any()):
            keep[group.name][scores[group.name].argmax()] = True
    weights = {group.name: group.parameters(model) for group in groups}
    return MaskPlan(type(model).__name__, tuple(groups), keep, scores, weights)


def _local(groups: Sequence[UnitGroup], scores: Mapping[str, Tensor], ratio: float, multiple: int) -> dict[str, Tensor]:
    keep = {}
    for group in groups:
        step = multiple if group.kind == "ffn" and group.count >= multiple else 1
        stays = max(1, round((1 - ratio) * group.count / step)) * step
        lost = group.count - min(stays, group.count)
        keep[group.name] = torch.ones(group.count, dtype=torch.bool)
        keep[group.name][scores[group.name].argsort()[:lost]] = False
    return keep


def _global(
    groups: Sequence[UnitGroup], scores: Mapping[str, Tensor], ratio: float, weights: Mapping[str, int]
) -> dict[str, Tensor]:
    """Removes units by rank until the share of the parameters is met."""
    order: list[tuple[float, int, int]] = []
    for kind in dict.fromkeys(group.kind for group in groups):
        units = [
            (float(score), index, unit)
            for index, group in enumerate(groups)
            if group.kind == kind
            for unit, score in enumerate(scores[group.name])
        ]
        order += [((rank + 0.5) / len(units), index, unit) for rank, (_, index, unit) in enumerate(sorted(units))]
    keep = {group.name: torch.ones(group.count, dtype=torch.bool) for group in groups}
    left = [group.count for group in groups]
    due = ratio * sum(weights[group.name] * group.count for group in groups)
    for _, index, unit in sorted(order):
        group = groups[index]
        if due < weights[group.name] / 2:
            continue  # a smaller unit may still fit
        if left[index] > 1:
            keep[group.name][unit] = False
            left[index] -= 1
            due -= weights[group.name]
    return keep
