"""Learning masks, choosing units, cutting them out; each trap of the method has a test."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import all_families, build

from smalti.acceleration.ecodiff import Learning, _backward, _Masks, learn_logits, learn_masks, prune, pruned
from smalti.acceleration.ecodiff_finetune import fine_tune
from smalti.acceleration.ecodiff_masks import MASKS, PRICES, binary, hard_concrete, l0, sigmoid, squashed_l1
from smalti.acceleration.ecodiff_plan import MaskPlan, make_plan, plan_below
from smalti.acceleration.ecodiff_report import pruning_report
from smalti.acceleration.ecodiff_runs import Runs, Starts, runs_of
from smalti.acceleration.ecodiff_trial import denoising_losses, gradient_error
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Batch, Cond
from smalti.evaluation.flops import count_flops
from smalti.objectives.flow_matching import FlowMatching
from smalti.sampling.guidance import Guidance
from smalti.sampling.loop import sample
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import SDE, Euler
from smalti.seams.importance import chance, taylor
from smalti.seams.units import masked, read_units
from smalti.training.config import TrainConfig


def small_model(seed=0, std=0.15):
    torch.manual_seed(seed)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def small_runs(model, count=6, steps=3, solver=None, guidance=2.0):
    torch.manual_seed(1)
    conds = [Cond(text=torch.randn(count, 3, 12), pooled=torch.randn(count, 10)) for _ in range(2)]
    starts = Starts(torch.randn(count, 4, 8, 8), *conds, torch.arange(count))
    return Runs(model, starts, uniform_schedule(steps), solver or Euler(), Guidance(guidance))


def test_the_hard_concrete_mask_is_that_of_its_formula_and_its_price_its_probability():
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for logit in (-2.0, 0.0, 1.5):
        mask = hard_concrete(torch.full_like(uniform, logit), uniform)
        assert mask.min() >= 0
        assert mask.max() <= 1
        assert (mask > 0).float().mean().item() == pytest.approx(l0(torch.tensor([logit])).item(), abs=5e-3)
    at_half = hard_concrete(torch.tensor([1.0]), torch.tensor([0.5])).item()
    assert at_half == pytest.approx(1.2 / (1 + 2.718281828 ** (-1 / 0.83)) - 0.1, abs=1e-5)
    ends = hard_concrete(torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0.0, 1.0]


def test_masks_are_about_one_at_the_start():
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    start = hard_concrete(torch.full_like(uniform, Learning().start), uniform)
    assert start.mean() > 0.9
    assert start.median() == 1
    assert (start == 0).float().mean() < 0.01
    assert sigmoid(torch.tensor(Learning().start), uniform) > 0.95


def test_binary_masks_are_zero_or_one_and_the_price_has_a_slope_everywhere():
    logits = torch.tensor([-3.0, -0.1, 0.1, 3.0], requires_grad=True)
    mask = binary(logits, torch.zeros(4))
    assert mask.tolist() == [0, 0, 1, 1]
    mask.sum().backward()
    assert (logits.grad > 0).all()
    far = torch.tensor([3.0], requires_grad=True)
    slopes = {name: torch.autograd.grad(price(far), far)[0].item() for name, price in PRICES.items()}
    assert squashed_l1(far).item() == pytest.approx(torch.sigmoid(torch.tensor(2.2)).item())
    assert slopes["squashed-l1"] > 4 * slopes["l0"] > 0


@pytest.fixture(scope="module")
def useless():
    """A model of which half of the neurons, one head and some modulation channels do nothing."""
    model = small_model()
    with torch.no_grad():
        for block in model.single_blocks:
            block.ffn.proj_out.weight[:, ::2] = 0
            block.attn.to_out.weight[:, :8] = 0
    return model


@pytest.mark.parametrize("settings", [{}, {"redraw": True}, {"objective": "steps"}, {"mask": "sigmoid"}])
def test_units_that_do_nothing_are_found(useless, settings):
    groups = read_units(useless, ("heads", "ffn"), "single")
    learning = Learning(updates=25, batch=3, rates={"heads": 0.3, "ffn": 0.3}, weight=1.0, **settings)
    logits = learn_logits(useless, groups, small_runs(useless), learning, progress=False)
    for group in groups:
        idle = torch.zeros(group.count, dtype=torch.bool)
        if group.kind == "heads":
            idle[0] = True
        else:
            idle[::2] = True
        found = logits[group.name]
        assert found[idle].mean() < found[~idle].mean()
        if not settings:
            assert found[idle].max() < found[~idle].quantile(0.9)


def test_weights_stay_as_they_are_and_no_mask_stays(useless):
    before = {name: (one.clone(), one.requires_grad) for name, one in useless.named_parameters()}
    runs = small_runs(useless)
    plain = runs.originals(3).states
    learn_logits(useless, read_units(useless), runs, Learning(updates=2, batch=2, accumulate=2), progress=False)
    for name, one in useless.named_parameters():
        assert torch.equal(one, before[name][0])
        assert one.requires_grad == before[name][1]
        assert one.grad is None
    assert torch.equal(runs.originals(3).states, plain)


@pytest.mark.parametrize("solver", [Euler(), SDE()])
def test_noise_guidance_and_solver_of_both_models_are_the_same(solver):
    """With masks of one the distance is nothing: anything else would be a floor under the loss."""
    model = small_model()
    runs = small_runs(model, solver=solver)
    groups = read_units(model)
    originals = runs.originals(2)
    with masked(model, groups, {group.name: torch.ones(group.count) for group in groups}):
        assert torch.allclose(runs.originals(6).states, originals.states, atol=1e-5)
    other = replace(runs, starts=replace(runs.starts, seeds=runs.starts.seeds + 1))
    assert torch.equal(other.originals(2).states, originals.states) == (not solver.needs_noise)


def gradient_of_logits(model, redraw, updates=1):
    """The first gradient that learning sees, read from where the logits go."""
    groups = read_units(model, ("ffn",), "single_blocks.0")
    learning = Learning(updates=updates, batch=6, rates={"ffn": 0.1}, weight=0.0, start=0.0, redraw=redraw)
    return groups, learning


def test_masks_are_drawn_once_a_run_so_that_steps_computed_again_are_the_same():
    model = small_model().requires_grad_(False)
    runs = small_runs(model)
    found = {}
    for redraw in (False, True):
        groups, learning = gradient_of_logits(model, redraw)
        logits = {groups[0].name: torch.zeros(groups[0].count, requires_grad=True)}
        current = _Masks(learning)
        with masked(model, groups, current):
            current.draw(logits, 7)
            first, second = current[groups[0].name], current[groups[0].name]
            assert torch.equal(first, second) != redraw
            current.draw(logits, 7)
        originals = runs.originals(6)
        with masked(model, groups, current):
            _backward(runs, runs.starts, originals, current, learning)
        found[redraw] = logits[groups[0].name].grad
    groups, learning = gradient_of_logits(model, False)
    logits = torch.zeros(groups[0].count, requires_grad=True)
    current = _Masks(learning)
    current.draw({groups[0].name: logits}, 7)
    with masked(model, groups, current):
        final = sample(
            model, runs.starts.noise, runs.schedule, runs.solver, progress=False, **runs.settings(runs.starts)
        ).x
    loss = (final - runs.originals(6).states[:, -1]).flatten(1).norm(dim=1).mean()
    (full,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(found[False], full, rtol=1e-3, atol=1e-5 * full.abs().max().item())
    assert not torch.allclose(found[True], full, rtol=0.1)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_plan_meets_its_ratio_and_keeps_one_unit_of_each_layer(scope):
    model = small_model()
    groups = read_units(model)
    plan = make_plan(model, groups, chance(groups), 0.25, scope)
    assert plan.removed == pytest.approx(0.25, abs=0.08 if scope == "local" else 0.02)
    wide = make_plan(model, groups, chance(groups), 0.97, scope)
    assert all(bool(wide.keep[group.name].any()) for group in groups)
    if scope == "local":
        shares = {plan.sparsity()[group.name] for group in groups if group.kind == "ffn"}
        assert shares == {0.25}


def test_the_global_order_does_not_depend_on_the_scale_of_a_kind():
    """Logits of heads learned at a five times higher rate would else all go first."""
    model = small_model()
    groups = read_units(model)
    scores = chance(groups)
    scaled = {group.name: scores[group.name] * (1 if group.kind == "ffn" else 50) - 7 for group in groups}
    one, other = (make_plan(model, groups, some, 0.3, "global") for some in (scores, scaled))
    assert all(torch.equal(one.keep[name], other.keep[name]) for name in one.keep)
    assert {group.kind for group in groups if not one.keep[group.name].all()} == {"heads", "ffn", "mod"}


def test_a_threshold_is_an_absolute_choice():
    model = small_model()
    groups = read_units(model, ("heads", "ffn"))
    scores = {group.name: torch.linspace(-1, 1, group.count) for group in groups}
    plan = plan_below(model, groups, scores, 0.0)
    assert all(torch.equal(plan.keep[name], score > 0) for name, score in scores.items())
    none = plan_below(model, groups, scores, 2.0)
    assert all(int(keep.sum()) == 1 and bool(keep[-1]) for keep in none.keep.values())


def test_a_plan_is_saved_loaded_and_refused_by_another_model(tmp_path):
    model = small_model()
    groups = read_units(model)
    plan = make_plan(model, groups, chance(groups), 0.25)
    loaded = MaskPlan.load(plan.save(tmp_path / "plan"), model)
    assert all(torch.equal(loaded.keep[name], plan.keep[name]) for name in plan.keep)
    assert loaded.groups == plan.groups
    assert loaded.removed == plan.removed
    assert "double_blocks.0.attn" in loaded.table()
    assert "%" in loaded.table()
    with pytest.raises(UserError, match=r"was made for a MMDiT with 2 heads|64 ffn"):
        MaskPlan.load(tmp_path / "plan", prune(model, plan))


def test_a_cut_model_is_the_masked_one_smaller_and_cheaper(tmp_path):
    """Only binary masks count: the plan's own, in both."""
    model = small_model()
    groups = read_units(model)
    plan = make_plan(model, groups, chance(groups), 0.4)
    runs = small_runs(model)
    with pruned(model, plan):
        expected = runs.originals(6).states[:, -1]
    small = prune(model, plan)
    found = replace(runs, denoiser=small).originals(6).states[:, -1]
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(runs.originals(6).states[:, -1], expected, atol=1e-2)
    small.save_pretrained(tmp_path)
    again = MMDiT.from_pretrained(tmp_path).eval()
    assert torch.equal(replace(runs, denoiser=again).originals(6).states[:, -1], found)
    inputs = (runs.starts.noise, torch.full((6,), 0.5), runs.starts.cond)
    assert count_flops(lambda: small(*inputs)).total < count_flops(lambda: model(*inputs)).total
    report = pruning_report(model, small, plan, lambda one: one(*inputs), repeats=2)
    lost = plan.removed * sum(plan.weights[group.name] * group.count for group in groups)
    assert report.parameters[0] - report.parameters[1] == round(lost)
    assert "parameters" in str(report)
    assert str(report).count("\n") > len(groups)


def test_masks_are_learned_on_diffusers_models_through_a_denoiser():
    family = all_families()["flux"]
    model = build(family)
    arguments = family.inputs(0, 4, (2, 3))

    def denoiser(x, t, cond):
        given = {**arguments, "hidden_states": x, "timestep": t, "encoder_hidden_states": cond.text}
        given |= {"pooled_projections": cond.pooled}
        return model(**given, return_dict=False)[0]

    cond = Cond(arguments["encoder_hidden_states"], arguments["pooled_projections"])
    starts = Starts(arguments["hidden_states"], cond, None, torch.arange(4))
    runs = Runs(denoiser, starts, uniform_schedule(2), Euler())
    groups = read_units(model)
    logits = learn_logits(model, groups, runs, Learning(updates=2, batch=2), progress=False)
    plan = make_plan(model, groups, logits, 0.3)
    with pruned(model, plan):
        expected = runs.originals(4).states
    prune(model, plan, in_place=True)
    assert torch.allclose(runs.originals(4).states, expected, atol=1e-5)


@pytest.fixture(scope="module")
def pipe():
    from smalti.tokenizers.conv_autoencoder import ConvAutoencoder

    torch.manual_seed(0)
    autoencoder = ConvAutoencoder(4, 4, (8, 8), (1, 1), (1, 1)).eval()
    model = small_model()
    return TextToImagePipeline(model, autoencoder, make_scheduler("euler"), None, styles=["a", "b", "c"], size=32)


def test_a_pipeline_of_ours_draws_the_runs_that_are_compared(pipe):
    class Words:
        def encode(self, prompts):
            from smalti.core.protocols import TextEmbedding

            seeds = [sum(map(ord, one)) for one in prompts]
            rows = [torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            mask = torch.ones(len(rows), 4, dtype=torch.bool)
            return TextEmbedding(torch.stack(rows), torch.stack(rows).mean(1)[:, :10], mask, mask.long())

    pipe.use_text_encoder(Words())
    runs = runs_of(pipe, ["one", "two"], 4, style="b", seed=5)
    drawn = pipe(
        ["one", "two"], style="b", num_inference_steps=4, output_type="latent",
        generator=[torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)],
    ).images  # fmt: skip
    assert torch.allclose(runs.originals(2).states[:, -1], drawn, atol=1e-5)
    plan = learn_masks(
        pipe, ["one", "two"], 0.2, steps=2, learning=Learning(updates=1, batch=2), style=["a", "b"], progress=False
    )
    assert plan.removed == pytest.approx(0.15, abs=0.01)  # a fifth of two heads is none


def test_taylor_and_the_error_of_gradients_are_measured_on_runs():
    model = small_model().requires_grad_(False)
    runs, groups = small_runs(model, steps=8), read_units(model)
    assert gradient_error(model, groups, runs) < 1e-4
    losses = denoising_losses(runs)
    assert len(losses) == 8
    scores = taylor(model, groups, losses)
    assert all(bool((scores[group.name] > 0).any()) for group in groups)


def test_neurons_that_stay_can_be_a_multiple():
    model = small_model()
    groups = read_units(model, ("heads", "ffn"))
    plan = make_plan(model, groups, chance(groups), 0.3, "local", multiple=16)
    assert {int(plan.keep[group.name].sum()) for group in groups if group.kind == "ffn"} == {48}
    assert {int(plan.keep[group.name].sum()) for group in groups if group.kind == "heads"} == {1}


def test_user_errors_are_one_line(pipe):
    model = small_model()
    groups = read_units(model)
    bad = [
        (UserError, lambda: Learning(mask="soft")),
        (UserError, lambda: Learning(updates=0)),
        (UserError, lambda: make_plan(model, groups, chance(groups), 1.0)),
        (UserError, lambda: make_plan(model, groups, chance(groups), 0.5, "wide")),
        (Refusal, lambda: runs_of(model, ["a"])),
    ]
    for kind, call in bad:
        with pytest.raises(kind) as error:
            call()
        assert "\n" not in str(error.value)
    assert set(MASKS) == {"hard-concrete", "sigmoid", "binary"}


class Pictures:
    """Latents with random text."""

    def __len__(self):
        return 8

    def batch(self, indices, generators):
        rows = [torch.Generator().manual_seed(int(index)) for index in indices]
        x0, text, pooled = (
            torch.stack([torch.randn(*shape, generator=row) for row in rows]) for shape in ((4, 8, 8), (3, 12), (10,))
        )
        return Batch(x0, Cond(text, pooled), indices)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_cut_model_is_trained_on(rank, tmp_path):
    model = small_model(std=0.05)
    groups = read_units(model)
    small = prune(model, make_plan(model, groups, chance(groups), 0.3))
    before = {name: one.clone() for name, one in small.named_parameters()}
    trainer = fine_tune(small, FlowMatching(), Pictures(), TrainConfig(2, 4, ema=0.0), tmp_path, rank)
    report = trainer.fit()
    assert report.steps == 2
    changed = {name for name, one in small.named_parameters() if name in before and not torch.equal(one, before[name])}
    trained = [name for name, one in small.named_parameters() if one.requires_grad]
    if rank is None:
        assert changed
    else:
        assert all("lora" in name for name in trained)
        assert not changed
        assert any("attn.to_qkv" in name for name in trained)
