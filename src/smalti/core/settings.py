"""Settings from the command line: `key=value` pairs onto nested frozen dataclasses."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import yaml

from smalti.core.errors import UserError, unknown_name

Settings = TypeVar("Settings")


def override(settings: Settings, pairs: list[str]) -> Settings:
    """A copy with `key=value` pairs applied; dots reach into nested settings (`training.steps=100`).

    Values are YAML scalars or lists, converted to the type of the value that they replace.

    Raises:
        UserError: a pair without `=`, an unknown key (the nearest are offered) or a value of another type.
    """
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"setting {pair!r} has no value; write key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"setting {pair!r}: the value cannot be read; give a number, a word or [a, list]"
            ) from error
        settings = _replace(settings, key.strip().split("."), value, pair)
    return settings


def _replace(settings: Any, path: list[str], value: Any, pair: str) -> Any:
    name, *rest = path
    if isinstance(settings, dict):
        return settings | {name: _replace(settings.get(name), rest, value, pair) if rest else value}
    known = {f.name for f in fields(settings)} if is_dataclass(settings) else set()
    if name not in known:
        raise unknown_name("setting", name, known)
    old = getattr(settings, name)
    new = _replace(old, rest, value, pair) if rest else _convert(old, value, pair)
    return replace(settings, **{name: new})


def _convert(old: Any, value: Any, pair: str) -> Any:
    """The value as the type of the old one; None may become anything."""
    if is_dataclass(old) or isinstance(old, dict):
        raise UserError(
            f"setting {pair!r} names a group of settings; reach into it with a dot, such as training.steps=100"
        )
    if isinstance(old, tuple):
        return tuple(value) if isinstance(value, list) else (value,)
    if isinstance(old, bool) or old is None or value is None:
        fits = value is None or old is None or isinstance(value, bool)
    elif isinstance(old, int | float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if fits and isinstance(old, int) and not float(value).is_integer():
            fits = False
        value = type(old)(value) if fits and not (isinstance(old, int) and isinstance(value, float)) else value
    else:
        fits = isinstance(value, str)
    if not fits:
        raise UserError(f"setting {pair!r}: a value like {old!r} is needed")
    return int(value) if isinstance(old, int) and not isinstance(old, bool) and isinstance(value, float) else value
