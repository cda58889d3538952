import json

import pytest

from smalti.core.errors import UserError
from smalti.data.catalog import datasets, get


def test_members_offer_their_sets_by_discovery():
    found = {info.name: info for info in datasets()}
    assert {"emoji", "emoji-tones", "emoji-128", "openmoji"} <= set(found)
    assert list(found) == sorted(found)
    assert "emojibase-data" in found["emoji"].where
    assert found["openmoji"].licence == "CC-BY-SA-4.0"


def test_entries_are_json():
    listed = json.loads(json.dumps([info.as_json() for info in datasets()]))
    emoji = next(one for one in listed if one["name"] == "emoji")
    assert emoji["ready"] is True
    assert emoji["path"].endswith("emoji.zip")


def test_an_unknown_set_is_refused():
    with pytest.raises(UserError, match="did you mean 'openmoji'"):
        get("opnmoji")
