"""What every method must do on every family of transformers, near relatives aside; both are found, none is listed."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import build, contract_families, euler

import smalti
from smalti.core.errors import NeverEngaged, Refusal
from smalti.evaluation.flops import count_flops
from smalti.seams.find import methods

FAMILIES, METHODS = contract_families(), {one.__name__: one for one in methods()}
STEPS = 12


@pytest.fixture(scope="module")
def models():
    """Every family's model, its plain result and its FLOPs."""
    built = {}

    def get(name):
        if name not in built:
            model = build(FAMILIES[name])
            results = []
            flops = count_flops(lambda: results.append(euler(model, FAMILIES[name], STEPS))).total
            built[name] = (model, results[0], flops)
        return built[name]

    return get


def test_methods_and_families_are_found():
    assert METHODS
    assert len(FAMILIES) >= 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_contract(method, family, models):
    kind, (model, plain, flops) = METHODS[method], models(family)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    reason = refusal_of(kind, model, FAMILIES[family], plain, flops)
    assert torch.equal(euler(model, FAMILIES[family], STEPS), plain)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention

    if reason is not None:
        assert len(reason) > 20
        assert "\n" not in reason
        pytest.skip(f"refused: {reason}")


def refusal_of(kind, model, family, plain, flops):
    """Checks the neutral and all active settings; returns the reason if the method refuses this model."""
    try:
        with smalti.apply(model, kind.neutral()):
            assert torch.equal(euler(model, family, STEPS), plain)
        check_active(kind.active(), model, family, plain, flops)
        check_nothing_leaks(kind.active(), model, family)
        for setting in kind.variants():
            check_active(setting, model, family, plain, flops)
    except NeverEngaged:
        raise
    except Refusal as refusal:
        return str(refusal)
    return None


def check_active(setting, model, family, plain, flops):
    """An active setting changes the result and the work as declared, the same at every call."""
    results = []
    with smalti.apply(model, setting) as handle:
        results.append(euler(model, family, STEPS))  # at a new shape, layouts are read first: that is not counted
        counted = count_flops(lambda: results.append(euler(model, family, STEPS))).total
        report = handle.report()
    assert torch.equal(*results)
    assert torch.isfinite(results[0]).all()
    assert not torch.equal(results[0], plain)
    expected = {"less": counted < flops, "same": True, "more": counted > flops}
    assert expected[setting.work], (counted, flops)
    assert report.runs == 2
    assert report.methods[0].events
    assert str(setting).startswith(type(setting).__name__)


def check_nothing_leaks(setting, model, family):
    """A run does not depend on what another run, of another shape and text, left."""
    with smalti.apply(model, setting):
        first = euler(model, family, STEPS)
        other = euler(model, family, STEPS, seed=3, batch=2, size="large")
        assert torch.equal(euler(model, family, STEPS), first)
    with smalti.apply(model, setting):
        assert torch.equal(euler(model, family, STEPS, seed=3, batch=2, size="large"), other)


@pytest.mark.parametrize("method", METHODS)
def test_two_of_a_kind_are_refused_and_gradients_are_by_default(method, models):
    kind, (model, *_) = METHODS[method], models("mmdit")
    if kind.owns:
        with pytest.raises(Refusal, match="cannot act together"):
            smalti.apply(model, kind.active(), kind.active())
    if not kind.supports_grad:
        family = FAMILIES["mmdit"]
        with smalti.apply(model, kind.active()), pytest.raises(Refusal, match="gradients"), torch.enable_grad():
            model(**family.inputs(0, 1, (4, 6)))
