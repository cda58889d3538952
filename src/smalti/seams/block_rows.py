"""A call of a block as one whose tokens can be cut: its arguments, the stream of the image, what becomes of turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from smalti.core.errors import Refusal, UserError
from smalti.seams.anatomy import Block
from smalti.seams.frame import Forward


@dataclass(frozen=True)
class BlockRows:
    """One call of a block: its arguments by position or name, and which of them and of its outputs holds the image."""

    block: Block
    forward: Forward
    arguments: Mapping[int | str, Any]
    positional: int
    name: int | str
    output: int

    @property
    def stream(self) -> Tensor:
        """The tokens that hold the image."""
        return self.arguments[self.name]

    def given(self, changed: Mapping[int | str, Any]) -> "BlockRows":
        """The call with some arguments changed."""
        return replace(self, arguments={**self.arguments, **changed})

    def run(self, arguments: Mapping[int | str, Any]) -> Any:
        """The block itself."""
        named = {name: value for name, value in arguments.items() if isinstance(name, str)}
        return self.forward(*(arguments[one] for one in range(self.positional)), **named)

    def image_of(self, outputs: Any) -> Tensor:
        """The output that holds the image."""
        return outputs[self.output] if isinstance(outputs, (tuple, list)) else outputs

    def with_image(self, outputs: Any, image: Tensor) -> Any:
        """The outputs with another image."""
        if not isinstance(outputs, (tuple, list)):
            return image
        return tuple(image if place == self.output else one for place, one in enumerate(outputs))


def visit(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A copy with `function` applied to every tensor inside tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: visit(one, function) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [visit(one, function) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: visit(getattr(value, one.name), function) for one in fields(value)})
    return value


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns an error of a model's own code, which did not expect fewer tokens, into a refusal."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        first = str(error).partition("\n")[0]
        raise Refusal(f"{what} cannot run some of its tokens: {first}") from error


def joined(outputs: Sequence[Any], order: Tensor) -> Any:
    """Outputs of turns as those of the whole batch."""
    leaves, specs = zip(*(pytree.tree_flatten(one) for one in outputs), strict=True)
    whole = [
        torch.cat(parts).index_select(0, order) if isinstance(parts[0], Tensor) else parts[0]
        for parts in zip(*leaves, strict=True)
    ]
    return pytree.tree_unflatten(whole, specs[0])
