"""What the README shows works: its Python runs, its commands exist, its folders are there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, tmp_path):
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=240, capture_output=True)
    assert list(tmp_path.iterdir())


def test_commands_and_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    usage = subprocess.run([sys.executable, "-m", "smalti.cli", "--help"], capture_output=True, text=True, check=True)
    for command in re.findall(
        r"smalti ([a-z]+)[ \[`\n]", "\n".join(blocks("bash")) + README.split("## The commands")[1]
    ):
        if command not in ("is", "train"):
            assert command in usage.stdout, command


def test_the_first_drawing_command_runs(tmp_path):
    line = next(line for line in "\n".join(blocks("bash")).splitlines() if line.startswith("smalti generate"))
    command = line.replace("smalti", f"{sys.executable} -m smalti.cli", 1)
    subprocess.run(command, shell=True, cwd=tmp_path, env=os.environ, check=True, timeout=240, capture_output=True)
    assert (tmp_path / "apple.png").is_file()


def test_folders_are_as_drawn():
    for folder in re.findall(r"^  (\w+)/  ", README, re.MULTILINE):
        assert (ROOT / "src" / "smalti" / folder).is_dir(), folder


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["update_readme", "update_systems"])
def test_figures_and_tables_are_current(name):
    assert script(name).updated(README) == README, "run make docs"


@pytest.mark.parametrize("name", ["peers", "systems", "accelerators"])
def test_pages_are_current(name):
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert script(f"update_{name}").page() == page, "run make docs"
