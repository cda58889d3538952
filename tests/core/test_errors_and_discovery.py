import pytest

from smalti.core.discovery import load_member, members
from smalti.core.errors import UserError, unknown_name


def test_nearest_names_are_offered():
    assert "did you mean 'twemoji'" in str(unknown_name("style", "twemojo", ["noto", "twemoji"]))
    assert "Known: none" in str(unknown_name("style", "x", []))


def test_members_are_found_by_listing():
    assert "files" in members("core")
    assert load_member("core", "errors").UserError is UserError
    with pytest.raises(UserError, match="unknown recipe 'emojo'; did you mean"):
        load_member("recipes", "emojo")
    with pytest.raises(UserError):
        load_member("recipes", "../core/errors")
