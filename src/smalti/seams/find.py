"""Methods are found by listing the stages that hold them, and made from words such as `taylorseer:interval=4`."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from types import ModuleType
from typing import Any

from smalti.core.discovery import load_member, members
from smalti.core.errors import unknown_name
from smalti.core.method import Method
from smalti.core.settings import override

STAGES = ("acceleration", "control", "editing")


def methods() -> Iterator[type[Method]]:
    """All methods that are found, each once, by listing the stages that hold them."""
    for stage in STAGES:
        for name in members(stage):
            yield from methods_of(load_member(stage, name))


def methods_of(module: ModuleType) -> Iterator[type[Method]]:
    """The methods that a module defines."""
    for _, one in inspect.getmembers(module, inspect.isclass):
        if issubclass(one, Method) and not inspect.isabstract(one) and one.__module__ == module.__name__:
            yield one


def load_method(slug: str) -> type[Method]:
    """The method of a system.

    Raises:
        UserError: no such method; the nearest names are offered.
    """
    known = {name: stage for stage in STAGES for name in members(stage)}
    module = slug.replace("-", "_")
    found = list(methods_of(load_member(known[module], module))) if module in known else []
    if not found:
        raise unknown_name("method", slug, [name.replace("_", "-") for name in known])
    return found[0]


def make_method(words: str) -> Method:
    """The method of `SLUG[:key=value,...]`; what is not given keeps its default.

    Raises:
        UserError: an unknown slug or key, or a value that does not fit.

    Example:
        >>> make_method("grat:group=[1,2,2],region=cross")
        GRAT(group=(1, 2, 2), region='cross', dense_steps=0)
    """
    slug, _, settings = words.partition(":")
    pairs = [pair for pair in re.split(r",(?![^\[]*\])", settings) if pair]  # commas inside brackets stay
    return override(load_method(slug)(), pairs)


def words_of(method: Method) -> str:
    """A method as `make_method` reads it: its slug, and what differs from its defaults."""
    slug = type(method).__module__.rpartition(".")[2].replace("_", "-")
    changed = [
        f"{one.name}={_word(getattr(method, one.name))}"
        for one in fields(method)  # type: ignore[arg-type]  # methods are dataclasses
        if getattr(method, one.name) != one.default
    ]
    return f"{slug}:{','.join(changed)}" if changed else slug


def _word(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
