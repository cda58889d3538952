"""Cuts units out of a model for good: smaller linear layers, fewer heads, the same result as with a mask of zeros.

Every kept unit keeps its numbers; the rows of the layers that made a removed unit and the columns of those that read it
are left out. Of modulation only rows go, and zeros are put where they stood. Our own models write the new shapes into
their configuration (see `nn.pruned`) and are saved and loaded as ever; classes of diffusers have no place for them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.errors import Refusal
from smalti.nn.pruned import ScatteredLinear
from smalti.seams.units import Place, UnitGroup

WIDTHS = ("inner_dim", "inner_kv_dim", "kv_inner_dim")
"""Attributes of diffusers' attention that hold heads * head_dim."""


@torch.no_grad()
def slice_units(model: nn.Module, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor]) -> None:
    """Cuts units out of a model, in place.

    Args:
        model: the transformer.
        groups: its units, as `read_units` gives them.
        keep: by name of a group, which of its units stay (count,) bool; groups that are not named stay whole.

    Raises:
        Refusal: units cannot be cut out, with the reason; the model is as it was.
    """
    cut = [group for group in groups if group.name in keep and not bool(keep[group.name].all())]
    _check(model, cut, keep)
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for group in cut:
        lost = ~keep[group.name].cpu()
        for place in group.readers:
            _strike(columns, place, _at(model, place).in_features, lost, group.size)
        for place in group.writers:
            _strike(rows, place, _at(model, place).out_features, lost, group.size)
    scattered = {place.path for group in cut if group.kind == "mod" for place in group.writers}
    shapes: dict[str, dict[str, int]] = {}
    for path in dict.fromkeys((*rows, *columns)):
        layer: Any = model.get_submodule(path)
        new = _scatter(layer, rows[path]) if path in scattered else _sliced(layer, rows.get(path), columns.get(path))
        model.set_submodule(path, new)
        shapes[path] = _shape(new)
    for group in cut:
        if group.kind == "heads":
            heads = int(keep[group.name].sum())
            _count_heads(model.get_submodule(group.counter[0]), group, heads)
            shapes[group.counter[0]] = {"heads": heads}
    if "pruned" in getattr(model, "config", {}):
        model.register_to_config(pruned={**(model.config["pruned"] or {}), **shapes})  # type: ignore[operator]


def _check(model: nn.Module, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor]) -> None:
    name = type(model).__name__
    for group in groups:
        if group.fault:
            raise Refusal(f"heads of {group.name} in {name} cannot be cut out: {group.fault}; mask them instead")
        if not bool(keep[group.name].any()) and group.kind != "mod":
            raise Refusal(f"nothing would be left of {group.name} in {name}; keep at least one of its {group.count}")
        for place in (*group.readers, *group.writers):
            layer = _at(model, place)
            if type(layer) is not nn.Linear and (group.kind != "mod" or type(layer) is not ScatteredLinear):
                kind = type(layer).__name__
                raise Refusal(
                    f"{place.path} in {name} is a {kind}, and only plain linear layers are cut; fuse or unload it first"
                )


def _strike(kept: dict[str, Tensor], place: Place, width: int, lost: Tensor, size: int) -> None:
    """Crosses out the rows or columns of lost units."""
    mask = kept.setdefault(place.path, torch.ones(width, dtype=torch.bool))
    span = lost.repeat_interleave(size)
    for start in place.starts:
        mask[start : start + len(span)] &= ~span


def _sliced(layer: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> nn.Linear:
    weight, bias = layer.weight, layer.bias
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        bias = None if bias is None else bias[rows.to(bias.device)]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    with torch.device("meta"):
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    new.weight = nn.Parameter(weight.clone(), layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.clone(), layer.bias.requires_grad)
    return new.train(layer.training)


def _scatter(layer: nn.Linear | ScatteredLinear, rows: Tensor) -> ScatteredLinear:
    rows = rows.to(layer.weight.device)
    made = layer.index if isinstance(layer, ScatteredLinear) else torch.arange(len(rows), device=rows.device)
    stays = rows[made]
    new = ScatteredLinear(layer.in_features, layer.out_features, int(stays.sum()), layer.bias is not None)
    new.index = made[stays]
    new.weight = nn.Parameter(layer.weight[stays], layer.weight.requires_grad)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias[stays], layer.bias.requires_grad)
    return new.train(layer.training)


def _shape(layer: nn.Module) -> dict[str, int]:
    if isinstance(layer, ScatteredLinear):
        return {"scattered": len(layer.index)}
    assert isinstance(layer, nn.Linear)
    return {"in": layer.in_features, "out": layer.out_features}


def _count_heads(owner: nn.Module, group: UnitGroup, heads: int) -> None:
    """Head counts and widths that an attention keeps as numbers; 1 / sqrt(d) does not change."""
    attributes = vars(owner)
    attributes[group.counter[1]] = heads
    for name in WIDTHS:
        if attributes.get(name) == group.count * group.size:
            attributes[name] = heads * group.size
    if attributes.get("sliceable_head_dim") == group.count:
        attributes["sliceable_head_dim"] = heads


def _at(model: nn.Module, place: Place) -> Any:
    return model.get_submodule(place.path)
