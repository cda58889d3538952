import pytest

from smalti.core.errors import UserError
from smalti.core.files import (
    atomic_file,
    atomic_folder,
    check_creatable,
    check_writable,
    file_hash,
    read_json,
    write_json,
)


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": 1})
    assert read_json(path) == {"b": 1}
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"b": 1}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "file").write_text(content)
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "other").write_text("half")
        raise RuntimeError
    assert (path / "inner" / "file").read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="No space left") as caught, atomic_file(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write into"):
        check_writable(tmp_path / "file" / "folder")


def test_torn_json(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"cannot read .*a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError):
        read_json(tmp_path / "missing.json")


def test_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a").startswith("ba7816bf")


def test_a_place_is_proved_without_a_trace(tmp_path):
    check_creatable(tmp_path / "new" / "deep" / "a.png")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    for path, message in [
        (tmp_path / "file" / "a.png", "Not a directory"),
        (tmp_path, "is a folder"),
        (tmp_path / ("x" * 300 + ".png"), "too long"),
    ]:
        with pytest.raises(UserError, match=message):
            check_creatable(path)
