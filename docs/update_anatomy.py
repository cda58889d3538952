"""Writes docs/anatomy.md: what smalti reads from a tiny random model of every transformer class of diffusers."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import diffusers

from smalti.core.errors import Refusal
from smalti.core.protocols import TokenLayout
from smalti.seams.anatomy import Anatomy, read_anatomy
from smalti.seams.attach import attached
from smalti.seams.layout import read_layouts

ROOT = Path(__file__).parents[1]
HEAD = """# What is read from a model

Written by `make docs`: a tiny random model of each class is built, its modules are read and one call is watched.
Nothing in `seams/` knows these names.

{counts}

Tokens are told by what moves them: `image` tokens move with the noisy sample (in a model of sound they are sound),
`text` tokens with the text alone, `register` tokens with neither (references, a second sample beside the first).

| class | stacks of blocks | sublayers of a block | tokens of the attention that sees most |
|---|---|---|---|
"""


def classes() -> list[str]:
    """Every transformer that diffusers exports as a model."""
    exported = ((name, getattr(diffusers.models.transformers, name)) for name in dir(diffusers.models.transformers))
    return [name for name, one in exported if inspect.isclass(one) and issubclass(one, diffusers.ModelMixin)]


def page() -> str:
    """The table: stacks of blocks, sublayers of a block, token order of the widest attention."""
    sys.path.append(str(ROOT / "tests" / "families"))
    families: Any = importlib.import_module("family")
    rows: dict[str, str] = {}
    refused = set()
    for one in families.all_families().values():
        model = families.build(one)
        name = type(model).__name__
        try:
            anatomy = read_anatomy(model)
        except Refusal as refusal:
            refused.add(name)
            rows[name] = f"| {name} | refused: {refusal} | | |"
            continue
        tokens = _tokens(anatomy, one.inputs(0, 1, families.GRIDS["small"]))
        rows[name] = f"| {name} | {_stacks(anatomy)} | {_sublayers(anatomy)} | {tokens} |"
    known = classes()
    missing = [name for name in known if name not in rows]
    counts = (
        f"Of the {len(known)} transformer classes of diffusers {diffusers.__version__}, "
        f"{len(known) - len(missing) - len(refused & set(known))} are read, {len(refused & set(known))} refused"
        + (f"; not looked at yet: {', '.join(missing)}." if missing else "; the reason stands in the table.")
    )
    return HEAD.format(counts=counts) + "\n".join(rows[name] for name in sorted(rows)) + "\n"


def _stacks(anatomy: Anatomy) -> str:
    return ", ".join(dict.fromkeys(block.site.stack for block in anatomy.blocks))


def _sublayers(anatomy: Anatomy) -> str:
    found = (f"{one.site.name} ({one.site.kind})" for block in anatomy.blocks for one in block.sublayers)
    return ", ".join(dict.fromkeys(found))


def _tokens(anatomy: Anatomy, arguments: dict[str, Any]) -> str:
    """Segments of the attention of image tokens that sees most keys."""
    with attached(anatomy):
        layouts = read_layouts(anatomy, anatomy.model.forward, arguments)
    pairs = [(queries, layouts.keys[key]) for key, queries in layouts.queries.items()]
    pairs = [(queries, keys) for queries, keys in pairs if any(one.kind == "image" for one in queries.segments)]
    if not pairs:
        return "none: it is linear, or calls another function than `scaled_dot_product_attention`"
    queries, keys = max(pairs, key=lambda pair: len(pair[1]))
    return _segments(queries) + ("" if keys == queries else f", to keys {_segments(keys)}")


def _segments(layout: TokenLayout) -> str:
    return ", ".join(f"{one.length} {one.kind}" + (f" {one.grid}" if one.grid else "") for one in layout.segments)


if __name__ == "__main__":
    (ROOT / "docs" / "anatomy.md").write_text(page(), encoding="utf-8")
