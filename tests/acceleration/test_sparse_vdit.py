from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import smalti
from smalti.acceleration.head_plan import HeadPlan, SiteModes, StepGroup, shuffled_plan
from smalti.acceleration.sparse_vdit import IN_TURN, SparseVDiT, search_sparse_plan
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.core.protocols import Cond
from smalti.evaluation.flops import count_flops
from smalti.evaluation.held_out_prompts import Prompts, draw_latents
from smalti.evaluation.same_cost import relative_distances
from smalti.ops.head_patterns import MODES, Patterns, allowed_keys
from smalti.seams.apply import apply
from smalti.seams.find import make_method
from smalti.zoo.loader import load_model

GRID, WIDE = (3, 4, 4), Patterns(1 / 3, 0.5, 0.25)


def tiny(heads):
    torch.manual_seed(0)
    model = MMDiT.from_config({**MMDiT.tiny().config, "heads": heads}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def model_and_inputs(batch=1, mask=None, frames=3, heads=6):
    model = tiny(heads)
    cond = Cond(text=torch.randn(batch, 5, 12), pooled=torch.randn(batch, 10), mask=mask)
    return model, (torch.randn(batch, 4, frames, 8, 8), torch.full((batch,), 0.5), cond)


@torch.no_grad()
def run(model, inputs, method=None):
    if method is None:
        return model(*inputs)
    with smalti.apply(model, method):
        return model(*inputs)


def by_masks(modes, patterns=WIDE):
    """The same heads as plain attention under masks of tokens, one after another."""

    def attend(q, k, v, attn_mask=None, **settings):
        outputs = []
        for head in range(q.shape[1]):
            mode = modes[head % len(modes)]
            allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
            allowed[5:] = allowed_keys(torch.arange(48), mode if mode != "skip" else "full", patterns, GRID, before=5)[
                0
            ]
            allowed = allowed if attn_mask is None else allowed & attn_mask
            one = (x[:, head : head + 1] for x in (q, k, v))
            outputs.append(original(*one, attn_mask=allowed, **settings) * (mode != "skip"))
        return torch.cat(outputs, 1)

    original = F.scaled_dot_product_attention
    return attend


def test_all_heads_full_is_the_dense_model_bit_for_bit():
    model, inputs = model_and_inputs()
    full = HeadPlan((StepGroup(0.0, (SiteModes("double_blocks.0.attn", ("full",) * 6),)),))
    for plan in (HeadPlan(), full):
        assert SparseVDiT(plan).is_neutral
        assert torch.equal(run(model, inputs, SparseVDiT(plan)), run(model, inputs))


@pytest.mark.parametrize(
    "modes", [("diagonal", "stripes", "full", "diagonal", "skip", "multi-diagonal"), MODES, ("stripes",)]
)
@pytest.mark.parametrize("is_padded", [False, True])
def test_fused_heads_equal_masks_head_by_head(modes, is_padded, monkeypatch):
    """Gathered by mode and scattered back, and padded text stays masked."""
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]]) if is_padded else None
    model, inputs = model_and_inputs(batch=2, mask=mask)
    out = run(model, inputs, SparseVDiT(HeadPlan(rest=modes, patterns=WIDE)))
    assert not torch.allclose(out, run(model, inputs), atol=1e-2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_masks(modes))
    assert torch.allclose(out, run(model, inputs), atol=1e-3)


def test_one_call_a_mode(monkeypatch):
    """Head fusion: 6 heads of 3 modes are 3 attentions and their text rows, in every layer."""
    from smalti.acceleration import sparse_vdit

    calls, plain = [], sparse_vdit.mode_attention
    monkeypatch.setattr(
        sparse_vdit, "mode_attention", lambda q, *rest: (calls.append((rest[2], q.shape[1])), plain(q, *rest))[1]
    )
    model, inputs = model_and_inputs()
    run(model, inputs, SparseVDiT(HeadPlan(rest=("skip", "stripes", "full"), patterns=WIDE)))
    assert calls == [("skip", 2), ("stripes", 2), ("full", 2)] * (len(calls) // 3)


def test_skipping_everything_leaves_the_bias_of_the_projection():
    model, inputs = model_and_inputs()
    out = run(model, inputs, SparseVDiT(HeadPlan(rest=("skip",))))
    assert torch.isfinite(out).all()
    for name, parameter in model.named_parameters():
        if "to_qkv" in name:  # values of zero make every head's output zero, too
            parameter.data[2 * len(parameter) // 3 :] = 0
    assert torch.allclose(run(model, inputs), out, atol=1e-5)


def test_attention_costs_what_the_plan_says():
    model, inputs = model_and_inputs()
    tokens, text = 48, 5

    def cost(method=None):
        run(model, inputs, method)
        return count_flops(lambda: run(model, inputs, method)).attention

    plain = cost(SparseVDiT(HeadPlan()))
    for mode, density in (("skip", 0), ("diagonal", 1 / 3), ("multi-diagonal", 0.5), ("stripes", 0.25)):
        found = cost(SparseVDiT(HeadPlan(rest=(mode, "full"), patterns=WIDE)))
        rows = 0 if mode == "skip" else tokens * (tokens * density + text) + text * (tokens + text)
        assert found / plain == pytest.approx(0.5 + 0.5 * rows / (tokens + text) ** 2)


def test_a_plan_of_another_grid_is_laid_out_anew_and_the_report_says_so():
    plan = HeadPlan(rest=("diagonal",), patterns=WIDE, grid=GRID)
    model, inputs = model_and_inputs()
    other = (torch.randn(1, 4, 6, 8, 8), *inputs[1:])
    with smalti.apply(model, SparseVDiT(plan)) as handle, torch.no_grad():
        model(*inputs)
        assert set(handle.report().methods[0].events) == {"sparse heads"}
        assert torch.isfinite(model(*other)).all()
        assert f"sparse heads, the plan of {GRID} laid out anew" in handle.report().methods[0].events


def test_dense_steps_and_groups_of_steps():
    model, (x, _, cond) = model_and_inputs()
    sites = tuple(SiteModes(f"{name}.attn", ("skip",) * 6) for name in ("double_blocks.0", "single_blocks.0"))
    full = tuple(replace(one, modes=("full",) * 6) for one in sites)
    late = HeadPlan((StepGroup(0.0, full), StepGroup(0.5, sites)))

    def events(method, steps=8):
        with smalti.apply(model, method) as handle, handle.run(steps=steps), torch.no_grad():
            for step in range(steps):
                model(x, torch.full((1,), 1 - step / steps), cond)
            return handle.report().methods[0].events["sparse heads"]

    layers = events(SparseVDiT(HeadPlan(rest=("skip",)))) // 8
    assert events(SparseVDiT(HeadPlan(rest=("skip",)), dense_steps=0.25)) == 6 * layers
    assert events(SparseVDiT(late)) == 4 * 2
    assert events(SparseVDiT(late, dense_steps=7)) == 2


def test_the_wrong_model_and_the_wrong_heads_are_refused():
    model, inputs = model_and_inputs(heads=2)
    with pytest.raises(Refusal, match="made for Other"):
        smalti.apply(model, SparseVDiT(HeadPlan(model="Other")))
    plan = HeadPlan((StepGroup(0.0, (SiteModes("double_blocks.0.attn", ("skip",) * 5),)),))
    with pytest.raises(Refusal, match="5 heads"):
        run(model, inputs, SparseVDiT(plan))


def test_patterns_that_leave_nothing_out_never_engage():
    model, inputs = model_and_inputs()
    with pytest.raises(NeverEngaged, match="leaves keys out"):
        run(model, inputs, SparseVDiT(HeadPlan(rest=("diagonal",), patterns=Patterns(1, 1, 1))))


@pytest.fixture(scope="module")
def clips():
    """The pipeline of the zoo's clips, small enough to search on."""
    pipe = load_model("clip")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_search_on_prompts_makes_a_plan_that_runs_from_its_file(clips, tmp_path):
    settings = {"num_inference_steps": 3, "guidance_scale": 1.0}
    plan = search_sparse_plan(clips, ["dog", "sun"], target=0.6, patterns=Patterns(0.25, 0.25, 0.25), **settings)
    assert (plan.model, plan.grid) == ("MMDiT", (8, 8, 8))
    assert 0.5 < plan.density() <= 0.6
    assert all(len(one.losses) == len(one.modes) == 6 for one in plan.groups[0].sites)
    plan.save(tmp_path / "plan.json")
    generator = torch.Generator().manual_seed(0)
    method = make_method(f"sparse-vdit:plan={tmp_path / 'plan.json'}")
    assert method.heads == plan
    with apply(clips, method) as handle:
        clips("cat", generator=generator, output_type="latent", **settings)
        assert handle.report().methods[0].events["sparse heads"] > 0


def test_searched_modes_end_closer_than_the_same_modes_elsewhere(clips):
    prompts = Prompts(("red heart", "dog"), ("fluent-3d",) * 2, (3, 4))
    full = draw_latents(clips, prompts, 4, guidance_scale=1.0)
    plan = search_sparse_plan(clips, ["cat", "sun"], target=0.5, num_inference_steps=4, guidance_scale=1.0)

    def far(method):
        with apply(clips, method):
            return sum(relative_distances(draw_latents(clips, prompts, 4, guidance_scale=1.0), full))

    assert far(SparseVDiT(plan)) < 0.8 * min(far(SparseVDiT(shuffled_plan(plan, seed))) for seed in range(2))


def test_without_a_plan_the_modes_go_in_turn():
    assert SparseVDiT().heads == IN_TURN
    assert not SparseVDiT().is_neutral
    assert "in turn diagonal" in str(SparseVDiT())


def test_bad_settings_are_refused_in_one_line(tmp_path):
    (tmp_path / "other.json").write_text("[]")
    for settings in ({"dense_steps": -1}, {"plan": tmp_path / "none.json"}, {"plan": str(tmp_path / "other.json")}):
        with pytest.raises(UserError) as error:
            SparseVDiT(**settings)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no prompts"):
        search_sparse_plan(None, [], eps=1.0)
