"""What every system page keeps; pages are found, none is listed."""

import ast
import inspect

import pytest

from smalti.core import catalogue
from smalti.core.discovery import ROOT, load_member

PAGES = [one for one in catalogue.entries() if one.page is not None]


@pytest.mark.parametrize("one", PAGES, ids=lambda one: one.system.slug)
def test_a_page_is_whole(one):
    page = load_member("systems", one.module)
    assert page.SYSTEM.slug == one.system.slug
    assert list(inspect.signature(page.small).parameters) == ["ctx"]
    assert catalogue.purpose(one.page).count(".") >= 3
    assert all(catalogue.source_of(name) is not None for name in one.system.uses)
    assert (ROOT.parents[1] / "examples" / f"{one.module}.py").is_file()
    assert (ROOT / "zoo").is_dir()
    for model in one.system.models:
        assert (ROOT / "zoo" / model).is_dir(), model


@pytest.mark.parametrize("one", PAGES, ids=lambda one: one.system.slug)
def test_what_a_page_uses_exists_by_name(one):
    for dotted in one.system.uses:
        source, name = catalogue.source_of(dotted), dotted.split(".")[-1]
        defined = {node.name for node in ast.parse(source.read_text()).body if hasattr(node, "name")}
        assert name in defined, dotted
