import pytest

from smalti.core.errors import UserError
from smalti.training.config import TrainConfig
from smalti.training.run_folder import check_run, open_run


def test_a_folder_belongs_to_one_training(tmp_path, capsys):
    run, identity = tmp_path / "deep" / "run", {"training": TrainConfig(steps=3, batch=2), "sizes": (1, 2)}
    check_run(run, resume=False)
    assert not list(tmp_path.iterdir())
    open_run(run, identity, resume=True)
    assert "nothing to resume" in capsys.readouterr().err
    open_run(run, identity, resume=True)
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="go on with --resume"):
        check_run(run, resume=False)
    with pytest.raises(UserError, match=r"training\.steps was 3, is 4"):
        open_run(run, {**identity, "training": TrainConfig(steps=4, batch=2)}, resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_other_things_is_left_alone(tmp_path, resume):
    (tmp_path / "letter.txt").write_text("dear friend")
    with pytest.raises(UserError, match="is not empty and holds no training"):
        open_run(tmp_path, {}, resume)
    with pytest.raises(UserError, match="cannot write"):
        open_run(tmp_path / "letter.txt", {}, resume)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]
