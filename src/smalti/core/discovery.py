"""Members of a stage are found by listing its folder; nothing is registered anywhere.

Folders in the environment variable `SMALTI_PATH` are laid out like the package (`systems/mine.py`,
`acceleration/mine.py`) and listed with it, so a system of one's own needs no change of smalti's files.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from smalti.core.errors import UserError, unknown_name

ROOT = Path(__file__).parents[1]


def roots() -> list[Path]:
    """The package's folder, then those of `SMALTI_PATH`."""
    given = [Path(path) for path in os.environ.get("SMALTI_PATH", "").split(os.pathsep) if path]
    for path in given:
        if not path.is_dir():
            raise UserError(f"SMALTI_PATH names {path}, which is no folder; give folders laid out like smalti's own")
    return [ROOT, *given]


def members(stage: str) -> list[str]:
    """Module names of a stage without importing them, sorted: `members("recipes")`."""
    return sorted(
        {path.stem for root in roots() for path in (root / stage).glob("*.py") if not path.stem.startswith("_")}
    )


def member_path(stage: str, name: str) -> Path | None:
    """The file of a member, or None; `-` and `_` are the same in its name."""
    paths = (root / stage / f"{name.replace('-', '_')}.py" for root in roots())
    return next((path for path in paths if path.is_file()), None)


def load_member(stage: str, name: str) -> ModuleType:
    """Imports one member; `-` and `_` are the same in its name.

    Raises:
        UserError: there is no such member; the nearest names are offered.
    """
    module = name.replace("-", "_")
    if module not in members(stage):
        raise unknown_name(stage.rstrip("s"), name, members(stage))
    _open_folders()
    return importlib.import_module(f"smalti.{stage}.{module}")


def _open_folders() -> None:
    """Lets the stages' packages find modules in the folders of `SMALTI_PATH`, which import one another."""
    for root in roots()[1:]:
        for folder in (path for path in root.iterdir() if (ROOT / path.name / "__init__.py").is_file()):
            package = importlib.import_module(f"smalti.{folder.name}")
            if str(folder) not in package.__path__:
                package.__path__.append(str(folder))


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
