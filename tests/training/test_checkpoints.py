import json
import shutil

import pytest
import torch

from smalti.core.errors import UserError
from smalti.training import checkpoints
from smalti.training.checkpoints import Checkpoint


def make(step, value=None):
    weight = torch.full((4, 3), float(step if value is None else value))
    return Checkpoint(step, {"model": {"a": weight, "b.c": weight.T}, "random": {}}, {"position": step * 16})


def names(folder):
    return [path.name for path in sorted(folder.iterdir())]


def test_what_is_saved_is_loaded(tmp_path):
    path = checkpoints.save(tmp_path, make(3), keep_last=2)
    assert path == checkpoints.latest(tmp_path) == tmp_path / "step-00000003"
    again = checkpoints.load(path)
    assert (again.step, again.state) == (3, {"position": 48})
    torch.testing.assert_close(again.tensors["model"]["b.c"], torch.full((3, 4), 3.0))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert set(listed) == {"model.safetensors", "random.safetensors", "state.json"}


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.save(tmp_path, make(step), keep_last=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def flip(path):
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


TEARS = {
    "cut": cut,
    "flipped bit": flip,
    "missing file": lambda path: (path / "model.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "torn manifest": lambda path: (path / "manifest.json").write_text('{"files": {"mod'),
    "strange manifest": lambda path: (path / "manifest.json").write_text("[1, 2]"),
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS.keys())
def test_a_torn_checkpoint_is_passed_over_with_one_line(tmp_path, capsys, tear):
    for step in (1, 2):
        checkpoints.save(tmp_path, make(step), keep_last=2)
    tear(tmp_path / "step-00000002")
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000001"
    message = capsys.readouterr().err.strip()
    assert "step-00000002 is torn" in message
    assert message.endswith("going on from step-00000001")
    assert "\n" not in message


def test_a_torn_one_does_not_push_out_whole_ones(tmp_path):
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, make(step), keep_last=3)
    cut(tmp_path / "step-00000030")
    checkpoints.save(tmp_path, make(25), keep_last=2)
    assert names(tmp_path) == ["step-00000020", "step-00000025"]


def test_another_format_is_refused(tmp_path):
    path = checkpoints.save(tmp_path, make(1), keep_last=1)
    (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format 2"):
        checkpoints.load(path)


def test_nothing_but_torn_ones_means_a_start_from_nothing(tmp_path, capsys):
    cut(checkpoints.save(tmp_path, make(1), keep_last=1))
    assert checkpoints.latest(tmp_path) is None
    assert "starting from step 0" in capsys.readouterr().err
    checkpoints.save(tmp_path, make(1, value=7), keep_last=1)
    assert checkpoints.load(checkpoints.latest(tmp_path)).tensors["model"]["a"][0, 0] == 7


def test_leftovers_of_a_kill_are_cleared_and_other_files_left(tmp_path):
    checkpoints.save(tmp_path, make(1), keep_last=1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.x7")
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoints.latest(tmp_path).name == "step-00000001"
    checkpoints.clear_leftovers(tmp_path)
    assert names(tmp_path) == ["notes.txt", "step-00000001"]
