"""Members of a stage are found by listing its folder; nothing is registered anywhere."""

import importlib
import importlib.util
import sys
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


def benchmarks() -> dict[str, Path]:
    """The benchmark runners by name: a folder beside the package in a wheel, at the top of a checkout."""
    folders = [folder for folder in (ROOT / "benchmarks", ROOT.parents[1] / "benchmarks") if folder.is_dir()]
    return {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("[a-z]*.py"))}


def load_benchmark(name: str) -> ModuleType:
    """Imports one runner: a module with `Settings`, `run(settings) -> dict` and `table(result) -> str`.

    Raises:
        UserError: there is no such runner; the nearest names are offered.
    """
    found = benchmarks()
    if name.replace("-", "_") not in found:
        raise unknown_name("benchmark", name, found)
    spec = importlib.util.spec_from_file_location(f"smalti_benchmark_{name}", found[name.replace("-", "_")])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
