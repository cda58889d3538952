"""Arms run in processes of their own, are kept, and are trained anew when what they rest on changes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smalti.evaluation.arms import run_arms

PAGE = '''"""Draws numbers. It is a toy. It has arms."""
import os
import time
import torch
from smalti.core.system import System
SYSTEM = System(slug="toy-arms", uses=("ops.attention.attention",))
def small(ctx): ...
def arm(name, seed, gain=1.0):
    if name == "slow":
        open(os.environ["TOY_ARM"], "w").write(str(os.getpid()))
        time.sleep(60)
    if name == "broken":
        raise ValueError("this arm cannot be trained")
    loss = seed + (0.5 if name == "ours" else 1.0) * gain
    return {"loss": loss, "process": os.getpid(), "threads": torch.get_num_threads()}
'''


@pytest.fixture
def page(tmp_path, monkeypatch):
    folder = tmp_path / "more" / "systems"
    folder.mkdir(parents=True)
    (folder / "toy_arms.py").write_text(PAGE)
    monkeypatch.setenv("SMALTI_PATH", str(folder.parent))
    return folder / "toy_arms.py"


def test_arms_run_apart_and_are_paired_by_seed(page, tmp_path):
    said = []
    arms = run_arms("toy-arms", ["ours", "plain"], (0, 1, 2), tmp_path, {"gain": 2.0}, say=said.append)
    assert arms.values("ours", "loss") == [1.0, 2.0, 3.0]
    assert arms.values("plain", "loss") == [2.0, 3.0, 4.0]
    assert arms.means("loss") == {"ours": 2.0, "plain": 3.0}
    assert os.getpid() not in arms.values("ours", "process")
    assert set(arms.values("plain", "threads")) == {1.0}
    assert len(said) == 6
    found = arms.compare("ours", "plain", "loss")
    assert (found.outcome, found.pairs) == ("holds", 3)
    assert arms.compare("plain", "ours", "loss").outcome == "fails"


def test_a_finished_arm_is_kept_until_settings_or_page_change(page, tmp_path):
    def run(gain=1.0):
        said = []
        arms = run_arms("toy-arms", ["ours"], (0, 1), tmp_path, {"gain": gain}, processes=1, say=said.append)
        return arms.values("ours", "loss"), len(said)

    assert run() == ([0.5, 1.5], 2)
    assert run() == ([0.5, 1.5], 0)
    assert run(gain=2.0) == ([1.0, 2.0], 2)
    page.write_text(PAGE.replace("0.5 if", "0.25 if"))
    assert run() == ([0.25, 1.25], 2)


def test_a_failing_arm_stops_the_claim_and_the_others_are_kept(page, tmp_path):
    with pytest.raises(ValueError, match="cannot be trained"):
        run_arms("toy-arms", ["ours", "broken"], (0,), tmp_path, {}, processes=1, say=lambda text: None)
    assert [path.name for path in tmp_path.rglob("*.json")] == ["ours-0.json"]


def test_workers_end_with_the_claim_that_started_them(page, tmp_path):
    note = tmp_path / "process"
    code = f"from smalti.evaluation.arms import run_arms; run_arms('toy-arms', ['slow'], (0,), {str(tmp_path)!r}, {{}})"
    code = code.replace(repr(str(tmp_path)), f"__import__('pathlib').Path({str(tmp_path)!r})")
    claim = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TOY_ARM": str(note)})
    wait_for(lambda: note.is_file() and note.read_text())
    worker = int(note.read_text())
    claim.kill()
    claim.wait()
    wait_for(lambda: not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2])


def wait_for(condition):
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
