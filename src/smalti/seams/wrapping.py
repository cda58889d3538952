"""Replaces what an object's method does, and puts it back exactly.

Only instance attributes are touched: module lists, classes and hooks stay what they are. If something else wrapped the
same method later, ours stays inside it and passes everything through.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from smalti.seams.frame import Forward

Around = Callable[[Forward, tuple, dict], Any]
"""Called as `around(original, args, kwargs)` in place of a method."""
MARK = "wrapped_by_smalti"


def wrap(owner: Any, name: str, around: Around, is_compiled: bool = False) -> Callable[[], None]:
    """Wraps `owner.name` on this instance.

    Args:
        owner: the object.
        name: of the method.
        around: called in its place, never compiled.
        is_compiled: whether the original is compiled on its own, because it stands in a compiled block.

    Returns:
        A function that undoes it.
    """
    own = vars(owner).get(name)
    original = getattr(owner, name)
    inner = torch.compile(original) if is_compiled else original
    state = {"is_on": True}

    @torch.compiler.disable
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(inner, args, kwargs) if state["is_on"] else inner(*args, **kwargs)

    def undo() -> None:
        state["is_on"] = False
        if vars(owner).get(name) is wrapper:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

    setattr(wrapper, MARK, wrapper)  # others copy our attributes onto what they wrap around us
    setattr(owner, name, wrapper)
    return undo


def is_outermost(module: nn.Module) -> bool:
    """Whether nothing else, such as a hook that moves inputs to a device, comes before our wrapper of a forward."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, MARK, None) is forward and not module._forward_pre_hooks


def wrap_block(module: nn.Module, around: Around) -> list[Callable[[], None]]:
    """Wraps a block from outside, a compiled one too.

    Wrapped modules inside a compiled block break its graph, so it is compiled anew in pieces while it is wrapped.
    """
    if not is_compiled(module):
        return [wrap(module, "forward", around)]
    pieces = torch.compile(module._call_impl)
    return [wrap(module, "_compiled_call_impl", lambda _, args, kwargs: around(pieces, args, kwargs))]


def wrap_call(owner: Any, around: Callable[[Any, Forward, tuple, dict], Any]) -> Callable[[], None]:
    """Wraps `owner(...)`, which Python looks up on the class, by giving this one object a class of its own.

    The new class has the old one's name, module and signature, so that saving and loading see no difference.
    """
    old = type(owner)

    @functools.wraps(old.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(self, functools.partial(old.__call__, self), args, kwargs)

    owner.__class__ = type(
        old.__name__, (old,), {"__call__": call, "__module__": old.__module__, "__doc__": old.__doc__}
    )
    owner.__class__.__qualname__ = old.__qualname__
    changed = owner.__class__

    def undo() -> None:
        if owner.__class__ is changed:
            owner.__class__ = old

    return undo


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module._compiled_call_impl is not None
