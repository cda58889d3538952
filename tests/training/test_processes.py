import pytest
from accelerate.state import PartialState

from smalti.core.errors import UserError
from smalti.training import processes
from smalti.training.config import TrainConfig
from smalti.training.processes import make_accelerator


def test_launched_processes_that_do_not_find_each_other_are_refused(tmp_path, monkeypatch):
    make_accelerator(TrainConfig(steps=1, batch=2), tmp_path)
    assert PartialState().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched but this one sees 1"):
        make_accelerator(TrainConfig(steps=1, batch=2), tmp_path)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_tensorboard_available", lambda: False)
    with pytest.raises(UserError, match=r"smalti\[tracking\]"):
        make_accelerator(TrainConfig(steps=1, batch=2, tracker="tensorboard"), tmp_path)
    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        make_accelerator(TrainConfig(steps=1, batch=2, compile=True), tmp_path)
