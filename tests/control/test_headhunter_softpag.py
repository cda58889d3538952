import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("families", "seams")]
from family import GRIDS, all_families, build
from small_pipelines import flux_pipeline, wan_pipeline

import smalti
from smalti.acceleration.grat import GRAT
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.control.head_sets import HeadSet
from smalti.control.headhunter_softpag import PerturbedHeads
from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.evaluation.flops import count_flops

HEAD = {(1, 0): 1.0}


@pytest.fixture
def damage(monkeypatch):
    """Runs something with V in place of one head's output in the n-th attention, without any method."""

    def run(function, call, head, strength=1.0):
        calls = iter(range(1000))

        def damaged(query, key, value, **settings):
            out = torch._C._nn.scaled_dot_product_attention(query, key, value, **settings)
            if next(calls) == call:
                out[:, head] = (1 - strength) * out[:, head] + strength * value[:, head]
            return out

        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", damaged)
            return function()

    return run


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_the_prediction_is_led_away_from_the_damaged_one(predict, damage, strength):
    plain, damaged = predict(), damage(predict, 1, 0, strength)
    guided = predict(PerturbedHeads({(1, 0): strength}, scale=2.0, guidance=1.0))
    assert torch.allclose(guided, 3 * plain - 2 * damaged, atol=1e-5)
    assert (guided - plain).abs().max() > 1e-3


def test_only_self_attention_is_damaged(damage):
    family = all_families()["pixart"]
    model, arguments = build(family), family.inputs(0, 1, GRIDS["small"])

    @torch.no_grad()
    def run():
        return model(**arguments)[0]

    plain, damaged = run(), damage(run, 0, 1)  # attention to itself, then to the text
    with smalti.apply(model, PerturbedHeads({(0, 1): 1.0}, scale=1.0, guidance=1.0)):
        assert torch.allclose(run(), 2 * plain - damaged, atol=1e-4)


def test_of_one_stacked_call_the_second_half_is_guided(predict):
    alone = predict(PerturbedHeads(HEAD, scale=2.0, guidance=1.0))
    plain = predict()
    guided = predict(PerturbedHeads(HEAD, scale=2.0, guidance=4.0))
    assert torch.equal(guided[0], plain[0])
    assert torch.allclose(guided[1], plain[1] + (alone[1] - plain[1]) / 4, atol=1e-5)
    other = predict(PerturbedHeads(HEAD, scale=2.0, guidance=4.0, rows="first half"))
    assert torch.equal(other[1], plain[1])
    assert not torch.equal(other[0], plain[0])


@pytest.mark.parametrize(
    ("make", "guidance", "calls", "attention"),
    # Wan is called for the condition first, then without it, and a block attends to itself, then to the text
    [(wan_pipeline, 3.0, 2, 2), (flux_pipeline, 1.0, 1, 1)],
)
def test_a_pipeline_of_diffusers_draws_what_its_own_loop_with_a_damaged_model_does(
    damage, monkeypatch, make, guidance, calls, attention
):
    small = make()
    plain, forward, count = small.draw(4), small.model.forward, iter(range(1000))

    def guided(*arguments, **named):
        out = forward(*arguments, **named)
        if next(count) % calls:
            return out
        damaged = damage(lambda: forward(*arguments, **named), attention, 1)
        return (out[0] + 2.0 / guidance * (out[0] - damaged[0]),)

    with monkeypatch.context() as patch:
        patch.setattr(small.model, "forward", guided)
        by_hand = small.draw(4)
    with smalti.apply(small.pipe, PerturbedHeads({(1, 1): 1.0}, scale=2.0, guidance=guidance)) as handle:
        ours = small.draw(4)
    assert (by_hand - plain).abs().max() > 1e-2
    assert torch.allclose(ours, by_hand, atol=1e-4)
    assert handle.report().methods[0].events["guided"] == 4
    assert torch.equal(small.draw(4), plain)


def two_calls(predict_in, model, method, names=None):
    """An unconditional and a conditional call at two times."""
    outputs = []
    with smalti.apply(model, method) as handle:
        for t in (0.9, 0.8):
            for index in (0, 1):
                if names is None:
                    outputs.append(predict_in(rows=[index], t=t))
                else:
                    with handle.branch(names[index]):
                        outputs.append(predict_in(rows=[index], t=t))
    return outputs


@pytest.mark.parametrize(("rows", "names"), [("branch:1", None), ("auto", ("uncond", "cond"))])
def test_of_two_calls_the_conditional_one_is_guided(predict, model, rows, names):
    outputs = two_calls(predict, model, PerturbedHeads(HEAD, scale=2.0, guidance=4.0, rows=rows), names)
    for step, t in enumerate((0.9, 0.8)):
        plain, alone = predict(t=t), predict(PerturbedHeads(HEAD, scale=2.0, guidance=1.0), t=t)
        assert torch.allclose(outputs[2 * step], plain[:1], atol=1e-5)
        assert torch.allclose(outputs[2 * step + 1], plain[1:] + (alone[1:] - plain[1:]) / 4, atol=1e-5)


def test_branches_that_cannot_be_told_are_refused(predict, model):
    with pytest.raises(Refusal, match="no two halves"):
        two_calls(predict, model, PerturbedHeads(HEAD, guidance=4.0))
    with pytest.raises(Refusal, match="several branches"):
        two_calls(predict, model, PerturbedHeads(HEAD, guidance=1.0))
    with pytest.raises(Refusal, match="several branches"):
        two_calls(predict, model, PerturbedHeads(HEAD, guidance=1.0), ("cond", "uncond"))
    with pytest.raises(Refusal, match="guidance of the pipeline is not known"):
        predict(PerturbedHeads(HEAD))


@pytest.mark.parametrize("method", [PerturbedHeads({(1, 0): 0.0}, guidance=1.0), PerturbedHeads(HEAD, scale=0.0)])
def test_without_strength_nothing_changes_and_nothing_runs_twice(predict, model, method):
    assert torch.equal(predict(method), predict())
    once, twice = flops_of(predict, model), flops_of(predict, model, PerturbedHeads(HEAD, guidance=1.0))
    assert flops_of(predict, model, method) == once
    assert twice == 2 * once


def flops_of(predict, model, *methods):
    """Of a call after the first, in which layouts are read."""
    if not methods:
        return count_flops(predict).total
    with smalti.apply(model, *methods):
        predict()
        return count_flops(predict).total


def test_the_effect_grows_with_the_strength(predict):
    plain = predict()
    sizes = [(predict(PerturbedHeads({(1, 0): u}, guidance=1.0)) - plain).norm() for u in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0 < sizes[1]


def test_samples_of_a_batch_have_heads_of_their_own(predict):
    sets = [{(0, 0): 1.0}, {(2, 1): 1.0, (1, 0): 0.5}]
    together = predict(PerturbedHeads(sets, guidance=1.0))
    for index, one in enumerate(sets):
        alone = predict(PerturbedHeads(one, guidance=1.0), rows=[index])
        assert torch.allclose(together[index], alone[0], atol=1e-5)
    with pytest.raises(Refusal, match="heads for 3 samples and 2 rows"):
        predict(PerturbedHeads([*sets, HEAD], guidance=1.0))
    stacked = predict(PerturbedHeads([{(0, 0): 1.0}, HEAD], scale=2.0, guidance=4.0), rows=[0, 0, 1, 1])
    assert torch.allclose(stacked[3], predict(PerturbedHeads(HEAD, scale=2.0, guidance=4.0))[1], atol=1e-5)


def test_a_whole_layer_is_all_of_its_heads(predict):
    whole = predict(PerturbedHeads({(1, None): 1.0}, guidance=1.0))
    assert torch.equal(whole, predict(PerturbedHeads({(1, 0): 1.0, (1, 1): 1.0}, guidance=1.0)))
    assert torch.equal(whole, predict(PerturbedHeads("L1", guidance=1.0)))


def test_kinds_targets_and_paths_differ(predict):
    kinds = ("identity", "uniform", "mean query", "temperature:4", "zero")
    settings = [{"kind": kind, "target": target} for kind in kinds for target in ("joint", "image")]
    settings += [{"blend": "slerp"}, {"blend": "log-linear"}]
    results = [predict(PerturbedHeads({(1, 0): 0.5}, guidance=1.0, **one)) for one in settings]
    for index, one in enumerate(results):
        assert all(not torch.allclose(one, other, atol=1e-5) for other in results[:index]), settings[index]


def test_rescaling_gives_the_spread_of_the_plain_prediction(predict):
    plain, heads = predict(), {(layer, None): 1.0 for layer in range(3)}
    wide = predict(PerturbedHeads(heads, scale=8.0, guidance=1.0)).flatten(1).std(1)
    back = predict(PerturbedHeads(heads, scale=8.0, guidance=1.0, rescale=1.0)).flatten(1).std(1)
    assert (wide > 1.1 * plain.flatten(1).std(1)).all()
    assert torch.allclose(back, plain.flatten(1).std(1), atol=1e-4)


def test_it_acts_between_start_and_end(predict, model):
    with smalti.apply(model, PerturbedHeads(HEAD, guidance=1.0, start=0.25, end=0.75)) as handle, handle.run(steps=8):
        results = [predict(t=1 - step / 8) for step in range(8)]
    changed = [not torch.equal(one, predict(t=1 - step / 8)) for step, one in enumerate(results)]
    assert changed == [False, False, True, True, True, True, False, False]
    assert handle.report().methods[0].events == {"guided": 4}


def test_methods_that_remember_are_refused_and_others_are_softened_too(predict, model):
    with pytest.raises(Refusal, match="remembers every evaluation"):
        smalti.apply(model, TaylorSeer(), PerturbedHeads(HEAD, guidance=1.0))
    sparse = GRAT((1, 2, 2), "block:0")
    plain, alone = predict(sparse), predict(PerturbedHeads(HEAD, scale=2.0, guidance=1.0))
    both = predict(sparse, PerturbedHeads(HEAD, scale=2.0, guidance=1.0))
    assert not torch.allclose(both, plain, atol=1e-4)
    assert not torch.allclose(both, alone, atol=1e-4)


def test_a_set_keeps_its_variant_and_its_model(predict, tmp_path):
    found = HeadSet(HEAD, "uniform", "image", "dark", "MMDiT")
    found.save(tmp_path / "dark.json")
    with pytest.raises(UserError, match="found with kind='uniform', target='image'"):
        PerturbedHeads(found, guidance=1.0)
    one = PerturbedHeads(str(tmp_path / "dark.json"), guidance=1.0, kind="uniform", target="image")
    assert torch.equal(predict(one), predict(PerturbedHeads(HEAD, guidance=1.0, kind="uniform", target="image")))
    with pytest.raises(Refusal, match="found in Flux"):
        predict(PerturbedHeads(HeadSet(HEAD, model="Flux"), guidance=1.0))


@pytest.mark.parametrize(
    ("heads", "reason"),
    [({(3, 0): 1.0}, "3 blocks"), ({(1, 2): 1.0}, "2 heads"), (None, "no heads are named")],
)
def test_heads_that_are_not_there_are_refused(predict, heads, reason):
    with pytest.raises(Refusal, match=reason):
        predict(PerturbedHeads(heads, guidance=1.0))


def test_a_run_without_a_guided_call_says_so(predict, model):
    method = PerturbedHeads(HEAD, guidance=4.0, rows="branch:cond")
    with pytest.raises(NeverEngaged, match="branch:cond"):
        predict(method)


@pytest.mark.parametrize(
    "settings",
    [{"guidance": 0.0}, {"start": 0.5, "end": 0.5}, {"rescale": 2.0}, {"rows": "cond"}, {"rows": "branch:"},
     {"target": "text"}, {"blend": "cubic"}, {"kind": "blur"}, {"kind": "zero", "blend": "slerp"}, {"heads": "H1"}],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        PerturbedHeads(**settings)
    assert "\n" not in str(error.value)
