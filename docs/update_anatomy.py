"""Writes docs/anatomy.md: what smalti reads from a tiny random model of every transformer class of diffusers."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from smalti.core.errors import Refusal
from smalti.seams.anatomy import read_anatomy
from smalti.seams.apply import apply
from smalti.seams.find import load_method

ROOT = Path(__file__).parents[1]
HEAD = """# What is read from a model

Written by `make docs`: a tiny random model of each class is built, its modules are read and one call is watched.
Nothing in `seams/` knows these names.

| class | stacks of blocks | sublayers of a block | tokens of the last self-attention |
|---|---|---|---|
"""


def classes() -> list[str]:
    """Every transformer that diffusers exports as a model."""
    exported = ((name, getattr(diffusers.models.transformers, name)) for name in dir(diffusers.models.transformers))
    return [name for name, one in exported if inspect.isclass(one) and issubclass(one, diffusers.ModelMixin)]


def page() -> str:
    """The table: stacks of blocks, sublayers of a block, token order of the last self-attention."""
    sys.path.append(str(ROOT / "tests" / "families"))
    families: Any = importlib.import_module("family")
    rows: dict[str, str] = {}
    for one in families.all_families().values():
        model = families.build(one)
        name = type(model).__name__
        try:
            arguments = one.inputs(0, 1, families.GRIDS["small"])
            rows[name] = f"| {name} | {_stacks(model)} | {_sublayers(model)} | {_tokens(model, arguments)} |"
        except Refusal as refusal:
            rows[name] = f"| {name} | refused: {refusal} | | |"
    missing = [name for name in classes() if name not in rows]
    counts = (
        f"Of the {len(classes())} classes of diffusers {diffusers.__version__}, {len(classes()) - len(missing)} stand "
        f"above. No tiny model is built yet of the others: {', '.join(missing)}."
    )
    return HEAD + "\n".join([*(rows[name] for name in sorted(rows)), "", counts]) + "\n"


def _stacks(model: nn.Module) -> str:
    return ", ".join(dict.fromkeys(block.site.stack for block in read_anatomy(model).blocks))


def _sublayers(model: nn.Module) -> str:
    found = (f"{one.site.name} ({one.site.kind})" for block in read_anatomy(model).blocks for one in block.sublayers)
    return ", ".join(dict.fromkeys(found))


@torch.no_grad()
def _tokens(model: nn.Module, arguments: dict[str, Any]) -> str:
    """Segments of the last attention of a sequence to itself."""
    try:
        with apply(model, load_method("grat").neutral()) as handle:
            model(**arguments)
            (layouts,) = handle.layouts()
    except Refusal:
        return "none on a grid of its own"
    own = [queries for key, queries in layouts.queries.items() if queries == layouts.keys[key]]
    return ", ".join(f"{one.length} {one.kind}" + (f" {one.grid}" if one.grid else "") for one in own[-1].segments)


if __name__ == "__main__":
    (ROOT / "docs" / "anatomy.md").write_text(page(), encoding="utf-8")
