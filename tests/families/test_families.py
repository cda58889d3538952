"""Every transformer class of diffusers is read, or refused with its reason; no list of them stands here."""

import runpy
from pathlib import Path

import pytest
import torch
from family import GRIDS, all_families, build, call, contract_families, euler, readable_families

import smalti
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.errors import Refusal
from smalti.seams.anatomy import read_anatomy

READABLE = readable_families()
REFUSED = {name: one for name, one in all_families().items() if one.refused}
PAGE = Path(__file__).parents[2] / "docs" / "anatomy.md"


@pytest.mark.parametrize("name", READABLE)
def test_a_family_runs_and_depends_on_everything(name):
    family = READABLE[name]
    model = build(family)
    assert sum(one.numel() for one in model.parameters()) < 500_000
    small, large = euler(model, family, 2), euler(model, family, 2, batch=2, size="large")
    assert torch.isfinite(small).all()
    assert torch.isfinite(large).all()
    assert torch.equal(euler(model, family, 2), small)
    assert not torch.equal(euler(model, family, 2, seed=1), small)
    arguments = family.inputs(0, 1, GRIDS["small"])
    with torch.no_grad():
        at = [call(model, family, arguments, t)[0] for t in (0.2, 0.9)]
    assert torch.allclose(*at) is not family.uses_time


@pytest.mark.parametrize("name", READABLE)
def test_a_family_is_read_and_forecast_in_every_block(name):
    family = READABLE[name]
    model = build(family)
    anatomy = read_anatomy(model)
    assert (anatomy.sample, anatomy.time) == (family.sample, family.time)
    ran = sites_that_run(model, family, anatomy)
    assert {site.rpartition(":")[0] for site in ran} == {str(block.site) for block in anatomy.blocks}

    plain = euler(model, family, 5)
    with smalti.apply(model, TaylorSeer(interval=1)):
        assert torch.equal(euler(model, family, 5), plain)
    with smalti.apply(model, TaylorSeer(interval=3, warmup=2)) as handle:  # forecasts evaluations 2 and 3 of 5
        fast = euler(model, family, 5)
    assert torch.isfinite(fast).all()
    assert not torch.equal(fast, plain)
    assert torch.equal(euler(model, family, 5), plain)
    report = handle.report()
    assert report.runs == 1
    assert report.methods[0].events == {"forecast": 2 * sum(ran.values())}
    reached = {f"{block.site}:{one.site.name}": str(one.site) for block in anatomy.blocks for one in block.sublayers}
    assert {reached[site] for site in reached if site not in ran} == set(report.methods[0].left_off)


def sites_that_run(model, family, anatomy):
    """How often each sublayer runs in one evaluation of the plain model, by "block:sublayer"."""
    counts, hooks = {}, []
    for block in anatomy.blocks:
        for one in block.sublayers:
            name = f"{block.site}:{one.site.name}"

            def note(*_, name=name):
                counts[name] = counts.get(name, 0) + 1

            hooks.append(one.module.register_forward_hook(note))
    euler(model, family, 1)
    [hook.remove() for hook in hooks]
    return counts


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_what_is_missing(name):
    with pytest.raises(Refusal, match=REFUSED[name].refused) as refusal:
        smalti.apply(build(REFUSED[name]), TaylorSeer())
    assert "\n" not in str(refusal.value)


def test_every_class_of_diffusers_is_here_and_each_kind_is_in_the_contract():
    page = runpy.run_path(str(PAGE.parents[0] / "update_anatomy.py"))
    built = {type(build(one)).__name__ for one in all_families().values()}
    assert set(page["classes"]()) <= built
    assert len(READABLE) >= len(page["classes"]()) - len(REFUSED)
    assert 20 <= len(contract_families()) < len(READABLE)


def test_the_table_of_anatomies_is_current():
    page = runpy.run_path(str(PAGE.parents[0] / "update_anatomy.py"))["page"]()
    assert PAGE.read_text(encoding="utf-8") == page, "run make docs"
