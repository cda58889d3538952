"""Prepared sets: made from miniature packages in a temporary cache; (slow) the shipped one from the real packages."""

import json
import zipfile

import pytest

from smalti.core.errors import UserError
from smalti.core.files import file_hash
from smalti.data import emoji_sources
from smalti.data.emoji import load_emoji
from smalti.data.emoji_prepare import (
    BUILDS,
    DATASETS,
    LICENCES,
    SHIPPED,
    EmojiBuild,
    build_zip,
    is_held_out,
    prepare,
    prepared_path,
)

NAMES = {"groups": {"0": "people-body", "1": "component"}, "subgroups": {"0": "person", "1": "skin-tone"}}


def entry(hexcode, label, order, group=0, **further):
    return {"hexcode": hexcode, "label": label, "order": order, "group": group, "subgroup": group, **further}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A cache that holds tiny packages of captions and OpenMoji drawings."""
    pytest.importorskip("resvg_py")
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path))
    captions, drawings = tmp_path / "npm" / "emojibase-data-17.0.0", tmp_path / "npm" / "openmoji-17.0.0"
    tones = [entry("1F9D1-1F3FB", "person: light skin tone", 3)]
    woman = entry("1F469", "woman", 4, tags=["adult"], skins=[entry("1F469-1F3FB", "woman: light skin tone", 5)])
    listed = [
        woman,
        entry("1F9D1", "person", 2, tags=["adult"], skins=tones),
        entry("2764-FE0F", "red heart", 1, tags=["love"]),
        entry("1F3FB", "light skin tone", 9, group=1),
        {"hexcode": "1F1E6", "label": "regional indicator A"},
    ]
    for path, content in ((captions / "meta" / "groups.json", NAMES), (captions / "en" / "data.json", listed)):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    (drawings / "color" / "svg").mkdir(parents=True)
    (drawings / "LICENSE.txt").write_text("share alike")
    for number, name in enumerate(["1F469", "1F469-1F3FB", "1F9D1", "1F9D1-1F3FB", "2764", "1F3FB"]):
        circle = f'<circle cx="36" cy="36" r="{9 + number}"/>'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{circle}</svg>'
        (drawings / "color" / "svg" / f"{name}.svg").write_text(svg)
    return tmp_path


def test_a_set_is_prepared_into_the_cache_with_licences_and_read_back(packages):
    with pytest.raises(UserError, match="smalti data get openmoji"):
        load_emoji(variant="openmoji")
    path = prepare("openmoji")
    assert path == prepared_path("openmoji")
    found = load_emoji("all", variant="openmoji")
    assert [item.label for item in found.items] == ["red heart", "person", "woman"]  # emojibase's order, no components
    assert found.images.shape == (3, 64, 64, 4)
    assert (found.images[0, 32, 32] == (0, 0, 0, 255)).all()
    licences = {file.name for file in (path.parent / "licenses").iterdir()}
    assert licences >= {"ATTRIBUTION.md", "CC-BY-4.0.txt", "openmoji-17.0.0-LICENSE.txt"}
    before = path.stat().st_mtime_ns
    assert prepare("openmoji").stat().st_mtime_ns == before


def test_variants_follow_their_base_concept(packages, tmp_path):
    build_zip(EmojiBuild(styles=("openmoji",), tones=True), tmp_path / "tones.zip")
    with zipfile.ZipFile(tmp_path / "tones.zip") as archive:
        index = json.loads(archive.read("emoji.json"))
    rows = {row[0]: row for row in index["emoji"]}
    assert list(rows) == ["2764", "1f9d1", "1f9d1-1f3fb", "1f469", "1f469-1f3fb"]
    assert {row[1] for key, row in rows.items() if key != "2764"} == {"1f9d1"}
    assert rows["1f9d1-1f3fb"][3] == ["adult"]


def test_the_same_packages_give_the_same_bytes(packages, tmp_path):
    for name in ("a.zip", "b.zip"):
        build_zip(EmojiBuild(styles=("openmoji",), size=32), tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # no trace of the clock
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_unknown_sets_are_refused(tmp_path):
    for function in (prepare, prepared_path):
        with pytest.raises(UserError, match="did you mean 'openmoji'"):
            function("openmojis")


def test_about_a_tenth_is_held_out():
    assert 0.08 < sum(is_held_out(str(i)) for i in range(3000)) / 3000 < 0.12


def test_the_shipped_set_is_small_permissive_and_attributed():
    assert SHIPPED.stat().st_size <= 16_000_000
    with zipfile.ZipFile(SHIPPED) as archive:
        index = json.loads(archive.read("emoji.json"))
    assert not any("SA" in source["licence"] for source in index["sources"])
    attribution = (LICENCES / "ATTRIBUTION.md").read_text()
    for source in index["sources"]:
        assert f"{source['package']} {source['version']}" in attribution
    for text in ("Apache-2.0.txt", "CC-BY-4.0.txt", "fluent-MIT.txt", "emojibase-MIT.txt"):
        assert text in attribution
        assert len((LICENCES / text).read_text()) > 1000


def test_every_build_is_offered_and_ready_is_said_truly(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path))
    assert set(DATASETS) == set(BUILDS)
    assert {name for name, info in DATASETS.items() if info.is_ready} == {"emoji"}


@pytest.mark.slow
def test_the_shipped_set_is_made_anew_byte_for_byte(tmp_path):
    pytest.importorskip("resvg_py")
    try:
        for source in (emoji_sources.CAPTIONS, *(emoji_sources.style_source(s, 64) for s in BUILDS["emoji"].styles)):
            source.folder()
    except UserError as error:
        pytest.skip(f"the packages cannot be had here: {error}")
    build_zip(BUILDS["emoji"], tmp_path / "emoji.zip")
    assert file_hash(tmp_path / "emoji.zip") == file_hash(SHIPPED)
