import pytest
import torch

import smalti
from smalti.acceleration.draft_attention import DraftAttention
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.core.protocols import Cond
from smalti.evaluation.attention_recall import attention_recall, guided, record_attention
from smalti.evaluation.held_out_prompts import Prompts, draw_latents
from smalti.evaluation.same_cost import relative_distances
from smalti.zoo.loader import load_model

SMALL = {"pool": (1, 2, 2), "sparsity": 0.75, "dense_steps": 0}


def model_and_inputs(size=16, mask=None, batch=1):
    torch.manual_seed(0)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    cond = Cond(text=torch.randn(batch, 5, 12), pooled=torch.randn(batch, 10), mask=mask)
    return model, (torch.randn(batch, 4, size, size), torch.full((batch,), 0.5), cond)


@torch.no_grad()
def run(model, inputs, method=None):
    if method is None:
        return model(*inputs)
    with smalti.apply(model, method):
        return model(*inputs)


@torch.no_grad()
def run_steps(model, inputs, method, steps=8, planned=None):
    """The events of a run of several steps, and its last prediction."""
    x, _, cond = inputs
    with smalti.apply(model, method) as handle, handle.run(steps=planned):
        for step in range(steps):
            out = model(x + 0.2 * step, torch.full((len(x),), 1 - step / steps), cond)
        return handle.report().methods[0], out


def test_sparsity_zero_is_full_attention():
    model, inputs = model_and_inputs()
    assert torch.equal(run(model, inputs, DraftAttention(sparsity=0.0)), run(model, inputs))


def test_chosen_blocks_end_closer_to_full_attention_than_a_window_and_than_chance():
    """A trained model: random weights attend to nothing in particular."""
    pipe = load_model("emoji-1k")
    pipe.set_progress_bar_config(disable=True)
    prompt = Prompts(("red heart",), ("noto",), (3,))
    full = draw_latents(pipe, prompt, 4)
    settings = {
        "draft": {}, "row": {"rule": "row"}, "oracle": {"guide": "oracle"},
        "window": {"guide": "window", "rule": "row"}, "random": {"guide": "random", "rule": "row"},
    }  # fmt: skip
    far = {}
    for name, one in settings.items():
        with smalti.apply(pipe, DraftAttention(**SMALL, **one)):
            far[name] = relative_distances(draw_latents(pipe, prompt, 4), full)[0]
    assert max(far["draft"], far["row"], far["oracle"]) < 0.8 * min(far["window"], far["random"])
    seen = record_attention(pipe, lambda: draw_latents(pipe, prompt, 4), steps=(1,))
    recall = {guide: attention_recall(seen, (1, 2, 2), guided(guide, 0.75)).recall for guide in ("draft", "oracle")}
    assert 0.8 * recall["oracle"] < recall["draft"] < recall["oracle"]


@pytest.mark.parametrize("rule", ["head", "row", "mass"])
def test_each_sample_of_a_batch_is_what_it_is_alone(rule):
    """Batched guidance: branches have their own blocks, and their own text lengths."""
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    model, (x, t, cond) = model_and_inputs(batch=2, mask=mask)
    method = DraftAttention(**SMALL, rule=rule)
    both = run(model, (x, t, cond), method)
    assert not torch.allclose(both, run(model, (x, t, cond)), atol=1e-3)
    for one in range(2):
        alone = run(model, (x[one : one + 1], t[:1], cond[one : one + 1]), method)
        assert torch.allclose(alone[0], both[one], atol=1e-4)


def test_padded_text_stays_masked_inside_kept_text():
    mask = torch.tensor([[True, True, True, False, False]])
    model, (x, t, cond) = model_and_inputs(mask=mask)
    other = Cond(text=cond.text.clone(), pooled=cond.pooled, mask=mask)
    other.text[:, 3:] += 10
    method = DraftAttention(**SMALL)
    assert torch.allclose(run(model, (x, t, cond), method), run(model, (x, t, other), method), atol=1e-5)


@pytest.mark.parametrize("rule", ["head", "row", "mass"])
def test_a_grid_that_the_pool_does_not_divide(rule, monkeypatch):
    model, inputs = model_and_inputs(size=18)  # 9 x 9 tokens
    method = DraftAttention(**SMALL, rule=rule)
    out = run(model, inputs, method)
    assert not torch.allclose(out, run(model, inputs), atol=1e-3)
    monkeypatch.setattr("smalti.acceleration.draft_attention.choose", lambda *_: "dense")
    assert torch.allclose(run(model, inputs, method), out, atol=1e-4)


def test_no_query_is_left_without_keys():
    model, inputs = model_and_inputs()
    method = DraftAttention(pool=(1, 2, 2), sparsity=0.99, dense_steps=0)
    own = run(model, inputs, DraftAttention(pool=(1, 2, 2), sparsity=0.99, dense_steps=0, guide="window", rule="row"))
    assert torch.allclose(run(model, inputs, method), own, atol=1e-5)


def test_the_first_steps_and_the_chosen_layers_are_dense():
    model, inputs = model_and_inputs()
    layers = len(record_attention(model, lambda: run(model, inputs), steps=(0,)))
    count = {"pool": (1, 2, 2), "sparsity": 0.75}
    report, _ = run_steps(model, inputs, DraftAttention(**count, dense_steps=0.25), planned=8)
    assert report.events == {"gather": 6 * layers}
    report, _ = run_steps(model, inputs, DraftAttention(**count, dense_steps=3, dense_layers=(0,)))
    assert report.events == {"gather": 5 * (layers - 1)}
    with pytest.raises(Refusal, match="a share of the steps"):
        run(model, inputs, DraftAttention(**count, dense_steps=0.25))


def test_blocks_serve_for_as_many_evaluations_as_asked_for():
    model, inputs = model_and_inputs()
    once, fresh = run_steps(model, inputs, DraftAttention(**SMALL))
    kept, stale = run_steps(model, inputs, DraftAttention(**SMALL, reuse=3))
    layers = once.events["gather"] // 8
    assert kept.events == {"gather": 3 * layers, "gather, blocks kept": 5 * layers}
    assert once.kept == 0
    assert kept.kept > layers * 2 * 16 * 16  # the tables of two heads, and the order in which rows are gathered
    assert not torch.allclose(fresh, stale, atol=1e-4)


def test_a_draft_whose_mass_takes_all_blocks_engages_in_nothing():
    model, inputs = model_and_inputs()
    with pytest.raises(NeverEngaged):
        run(model, inputs, DraftAttention(pool=(1, 2, 2), sparsity=1e-6, dense_steps=0, rule="mass"))


def test_few_groups_bring_nothing_and_it_says_so():
    model, inputs = model_and_inputs(size=8)
    with pytest.raises(NeverEngaged, match="would have cost as much as plain attention"):
        run(model, inputs, DraftAttention(pool=(1, 8, 16), sparsity=0.75, dense_steps=0))


@pytest.mark.parametrize(
    "settings",
    [{"pool": (1, 0, 2)}, {"pool": (8, 16)}, {"sparsity": 1.0}, {"sparsity": -0.1}, {"dense_steps": -1}, {"reuse": 0},
     {"rule": "column"}, {"guide": "max"}],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        DraftAttention(**settings)
    assert "\n" not in str(error.value)
