"""A model that ends early: all weights are another model's, but of its blocks only the first ones run.

What comes behind the last of them (norm, projection) still runs on whatever it is given, which costs next to nothing;
the tokens after that block are what is wanted, and a tap takes them. The copy has hooks, and a compiled graph, of its
own: nothing that is done to it is seen by the other model. Where the weights of that one change in place, so do these.
"""

from typing import Any

from torch import nn

from smalti.core.errors import UserError
from smalti.seams.anatomy import read_anatomy


def truncated(model: nn.Module, depth: int) -> nn.Module:
    """A model with the first `depth` blocks of another.

    Args:
        model: any transformer that `seams.anatomy` reads.
        depth: number of blocks over all stacks in the order in which they stand.

    Raises:
        Refusal: the model cannot be read.
        UserError: it has not so many blocks.
    """
    blocks = read_anatomy(model).blocks
    if not 1 <= depth <= len(blocks):
        raise UserError(f"got a model of {depth} blocks; {type(model).__name__} has 1 to {len(blocks)}")
    kept: dict[str, list[nn.Module]] = {block.site.stack: [] for block in blocks}
    for block in blocks[:depth]:
        kept[block.site.stack].append(_twin(block.module))
    twin = _twin(model)
    for path, some in kept.items():
        owner = twin
        *parents, name = path.split(".")
        for parent in parents:
            owner._modules[parent] = _twin(owner.get_submodule(parent))
            owner = owner.get_submodule(parent)
        owner._modules[name] = nn.ModuleList(some)
    return twin


def _twin(module: Any) -> Any:
    """Another object with the same parameters, buffers and children, without hooks."""
    twin = object.__new__(type(module))
    state = {**vars(module), "_modules": dict(module._modules), "_compiled_call_impl": None}
    state |= {name: value for name, value in vars(nn.Module()).items() if "hook" in name}
    vars(twin).update(state)
    return twin
