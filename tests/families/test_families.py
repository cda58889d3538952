import runpy
from pathlib import Path

import pytest
import torch
from family import GRIDS, all_families, build, call, euler

FAMILIES = all_families()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_runs_and_depends_on_everything(name):
    family = FAMILIES[name]
    model = build(family)
    assert sum(one.numel() for one in model.parameters()) < 2_000_000
    small, large = euler(model, family), euler(model, family, batch=2, size="large")
    assert torch.isfinite(small).all()
    assert torch.isfinite(large).all()
    assert torch.equal(euler(model, family), small)
    assert not torch.equal(euler(model, family, seed=1), small)
    arguments = family.inputs(0, 1, GRIDS["small"])
    with torch.no_grad():
        at = [call(model, family, arguments, arguments[family.sample], t) for t in (0.2, 0.9)]
    assert not torch.allclose(*at)


def test_the_table_of_anatomies_is_current():
    root = Path(__file__).parents[2]
    page = runpy.run_path(str(root / "docs" / "update_anatomy.py"))["page"]()
    assert (root / "docs" / "anatomy.md").read_text(encoding="utf-8") == page, "run make docs"
