"""`smalti.apply`: methods on a pipeline or a model, in one reversible line."""

from itertools import combinations
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from smalti.core.errors import Refusal, UserError
from smalti.core.method import Bundle, Method
from smalti.seams.anatomy import find_stacks, read_anatomy, time_argument
from smalti.seams.handle import Handle, sites_of
from smalti.seams.wrapping import is_compiled


def apply(target: Any, *methods: Method | Bundle) -> Handle:
    """Lets methods act on every denoiser of a pipeline, or on one model, until the handle is removed.

    Args:
        target: a diffusers pipeline, or a transformer (ours, diffusers', or one built alike).
        methods: where several act at one seam, their own `order` decides which is outermost, then the given order; a
            plan stands for the methods that it names.

    Returns:
        A handle, which is also a context manager.

    Raises:
        Refusal: a method cannot act on this model or beside another one, or the model already carries methods.

    Example:
        >>> with smalti.apply(pipe, TaylorSeer(interval=4)) as handle:
        ...     picture = pipe("a green apple").images[0]
        >>> print(handle.report())
    """
    if not methods:
        raise UserError("got no method to apply; give at least one, such as TaylorSeer(interval=4)")
    bundles = [one for one in methods if isinstance(one, Bundle)]
    given: list[Method] = []
    for method in methods:
        if isinstance(method, Bundle):
            given += method.methods_for(target)
        elif isinstance(method, Method):
            given.append(method)
        else:
            raise UserError(f"got {method!r}, which is no method; give an object such as TaylorSeer(interval=4)")
    for one, other in combinations(given, 2):
        reason = one.refuses(other) or other.refuses(one)
        if reason:
            raise Refusal(f"{one} and {other} cannot act together: {reason}; apply one of them")
    anatomies = [read_anatomy(model) for model in denoisers(target)]
    for anatomy in anatomies:
        for method in given:
            if not sites_of(method, anatomy):
                raise Refusal(f"{type(anatomy.model).__name__} has no site at which {method} acts")
            method.check(anatomy.reading)
    return Handle(target, anatomies, tuple(sorted(given, key=lambda method: method.order)), bundles)


def denoisers(target: Any) -> list[nn.Module]:
    """The transformers that denoise in a pipeline (Wan 2.2 has two), or the model itself.

    Raises:
        Refusal: there is none, or it is compiled as a whole.
        UserError: the target is neither.
    """
    if isinstance(target, DiffusionPipeline):
        found = [one for one in target.components.values() if isinstance(one, nn.Module) and _is_denoiser(one)]
        if not found:
            raise Refusal(f"{type(target).__name__} has no transformer that takes a time; methods act on transformers")
        return [_whole(one) for one in found]
    if not isinstance(target, nn.Module):
        raise UserError(f"got {type(target).__name__}; give a diffusers pipeline or a transformer (nn.Module)")
    return [_whole(target)]


def _whole(model: nn.Module) -> nn.Module:
    """The model itself; one that is compiled in one piece is refused, because methods would leave nothing of that."""
    if hasattr(model, "_orig_mod") or is_compiled(model):
        name = type(getattr(model, "_orig_mod", model)).__name__
        raise Refusal(
            f"{name} is compiled as a whole, and methods decide between its blocks what to compute; compile the blocks "
            "alone: compile_repeated_blocks(), or block.compile() for each"
        )
    return model


def _is_denoiser(module: nn.Module) -> bool:
    module = getattr(module, "_orig_mod", module)
    return time_argument(module) is not None and any(True for _ in find_stacks(module))
