"""The house holds: imports go one way, stages have no cycles, a file named by a system is a leaf, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "smalti"
ORDER = [
    {"core"},
    {"ops"},
    {"nn"},
    {"data", "mixers", "tokenizers", "objectives"},
    {"backbones"},
    {"seams"},
    {"sampling"},
    {"zoo"},
    {"evaluation"},
    {"training"},
    {"acceleration", "control", "editing"},
    {"tasks"},
    {"recipes"},
    {"systems"},
    {"cli", "web"},
]
RANK = {stage: rank for rank, stages in enumerate(ORDER) for stage in stages}
FILES = sorted(SOURCE.rglob("*.py"))


def stage_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, ...]]:
    """Parts of every module of smalti that a file imports, the package's name left out."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path}: relative import"
            continue
        found += [tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "smalti"]
    return [parts for parts in found if parts and parts[0] != "__version__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path):
    parts = path.relative_to(SOURCE).parts
    if parts == ("__init__.py",):
        # inside `smalti.apply` and `smalti.plan`, on their first calls
        assert imports(path) == [("seams", "apply", "apply"), ("acceleration", "planner", "plan")]
        return
    stage = stage_of(parts)
    for target in imports(path):
        other = stage_of(target)
        assert RANK[other] < RANK[stage] or other == stage, f"{stage} may not import {other}"


def test_no_cycles():
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        names = {".".join(target[:k]) for target in imports(path) for k in (1, 2, 3)}
        graph[name] = names
    graph = {name: {other for other in others if other in graph and other != name} for name, others in graph.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_small(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    if path.parent.name == "systems":
        assert len(lines) <= 200


def test_stages_export_nothing():
    for path in FILES:
        if path.name == "__init__.py" and path.parent != SOURCE:
            assert len(ast.parse(path.read_text()).body) <= 1, f"{path} holds more than its docstring"


@pytest.mark.parametrize(("command", "limit"), [("import smalti", 60), ("import smalti.cli", 700)])
def test_start_is_light(command: str, limit: int):
    """Counted in modules, because seconds depend on the machine."""
    code = f"import sys; before = len(sys.modules); {command}; print(len(sys.modules) - before, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) <= limit
    assert out[1] == "False"
