"""Members of a stage are found by listing its folder; nothing is registered anywhere."""

import importlib
from pathlib import Path
from types import ModuleType

from smalti.core.errors import unknown_name

ROOT = Path(__file__).parents[1]


def members(stage: str) -> list[str]:
    """Module names of a stage without importing them, sorted: `members("recipes")`."""
    return sorted(path.stem for path in (ROOT / stage).glob("*.py") if not path.stem.startswith("_"))


def load_member(stage: str, name: str) -> ModuleType:
    """Imports one member; `-` and `_` are the same in its name.

    Raises:
        UserError: there is no such member; the nearest names are offered.
    """
    module = name.replace("-", "_")
    if module not in members(stage):
        raise unknown_name(stage.rstrip("s"), name, members(stage))
    return importlib.import_module(f"smalti.{stage}.{module}")
