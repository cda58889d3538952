"""Settings from the command line: `key=value` pairs onto nested frozen dataclasses."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import yaml

from smalti.core.errors import UserError, unknown_name

Settings = TypeVar("Settings")


class _Change(NamedTuple):
    path: list[str]
    text: str
    pair: str


def override(settings: Settings, pairs: list[str]) -> Settings:
    """A copy with `key=value` pairs applied; dots reach into nested settings (`training.steps=100`).

    Values are YAML scalars or lists, converted to the type of the value that they replace; `none` is none. All pairs
    are applied at once, so that their order does not matter where one value limits another.

    Raises:
        UserError: a pair without `=`, an unknown key (the nearest are offered) or a value of another type.
    """
    changes = []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"setting {pair!r} has no value; write key=value")
        changes.append(_Change(key.strip().split("."), text.strip(), pair))
    return _replace(settings, changes)


def _replace(settings: Any, changes: list[_Change]) -> Any:
    """A copy with all changes, whose paths begin here."""
    is_open = isinstance(settings, dict)  # what it may hold is checked by whoever reads it
    old = dict(settings) if is_open else {}
    if is_dataclass(settings):
        old = {f.name: getattr(settings, f.name) for f in fields(settings)}
    inner: dict[str, list[_Change]] = {}
    new: dict[str, Any] = {}
    for change in changes:
        name, *rest = change.path
        if name not in old and not is_open:
            raise unknown_name("setting", name, old)
        if rest:
            inner.setdefault(name, []).append(change._replace(path=rest))
        else:
            new[name] = _convert(old.get(name), change)
    new |= {name: _replace(new.get(name, old.get(name)), some) for name, some in inner.items()}
    if is_open:
        return {**old, **new}
    try:
        return replace(settings, **new)  # type: ignore[type-var]  # a dataclass, or its keys were refused
    except TypeError as error:  # a check of the settings met a list of another kind
        given = " ".join(change.pair for change in changes)
        raise UserError(f"settings {given!r} cannot be used: {error}") from error


def _convert(old: Any, change: _Change) -> Any:
    """The value as the type of the old one; None may become anything, and anything None."""
    if is_dataclass(old) or isinstance(old, dict):
        raise UserError(
            f"setting {change.pair!r} names a group of settings; reach into it with a dot, such as training.steps=100"
        )
    value = _read(change)
    if value is None or old is None:
        return value
    if isinstance(old, tuple):
        return tuple(value) if isinstance(value, list) else (value,)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(old, bool):
        fits = isinstance(value, bool)
    elif isinstance(old, int):
        fits = is_number and float(value).is_integer()
    elif isinstance(old, float):
        fits = is_number
    else:
        fits = not isinstance(value, list | dict)
        value = value if isinstance(value, str) else change.text  # YAML would make False of `no`
    if not fits:
        raise UserError(f"setting {change.pair!r}: a value like {old!r} is needed")
    return type(old)(value)


def _read(change: _Change) -> Any:
    if change.text.lower() == "none":
        return None
    try:
        return yaml.safe_load(change.text)
    except yaml.YAMLError as error:
        raise UserError(
            f"setting {change.pair!r}: the value cannot be read; give a number, a word or [a, list]"
        ) from error
