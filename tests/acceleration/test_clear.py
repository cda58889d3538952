import pytest
import torch
from torch import nn

import smalti
from smalti.acceleration.clear import CLEAR, PoolWeights, distilled
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import NeverEngaged, UserError
from smalti.core.protocols import Cond
from smalti.evaluation.flops import count_flops
from smalti.training.attention_deltas import attention_parameters, deltas_of, save_deltas


def model_and_inputs(size=16, masked=False):
    torch.manual_seed(0)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    mask = torch.tensor([[True, True, True, False, False]]) if masked else None
    cond = Cond(text=torch.randn(1, 5, 12), pooled=torch.randn(1, 10), mask=mask)
    return model, (torch.randn(1, 4, size, size), torch.tensor([0.5]), cond)


@torch.no_grad()
def run(model, inputs, method=None):
    if method is None:
        return model(*inputs)
    with smalti.apply(model, method):
        return model(*inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", [None, 4])
def test_all_ways_to_compute_it_agree(masked, pool):
    model, inputs = model_and_inputs(masked=masked)
    dense, gathered = (run(model, inputs, CLEAR(2, pool, backend=name)) for name in ("dense", "gather"))
    assert torch.allclose(dense, gathered, atol=1e-5)
    assert not torch.allclose(dense, run(model, inputs), atol=1e-4)


def test_the_radius_counts_tokens_and_not_pixels():
    """A pixel changes what its token's neighbours within the radius see, one block deep; the patch is 2 x 2."""
    model, (x, t, cond) = model_and_inputs()
    model.single_blocks = nn.ModuleList()
    other = x.clone()
    other[..., 8, 8] += 5  # of the token (4, 4)
    with smalti.apply(model, CLEAR(radius=3)), torch.no_grad():
        moved = (model(other, t, cond) - model(x, t, cond)).abs().amax(1)[0]
    tokens = moved.unflatten(0, (8, 2)).unflatten(2, (8, 2)).amax((1, 3)) > 1e-6
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(tokens, (rows - 4) ** 2 + (columns - 4) ** 2 < 9)


def test_the_number_of_text_tokens_is_read_from_the_input():
    model, (x, t, cond) = model_and_inputs()
    for length in (1, 9):
        inputs = (x, t, Cond(text=torch.randn(1, length, 12), pooled=cond.pooled))
        out = [run(model, inputs, CLEAR(2, 4, backend=name)) for name in ("dense", "gather")]
        assert torch.allclose(*out, atol=1e-5)


def test_masked_text_changes_nothing():
    model, (x, t, cond) = model_and_inputs(masked=True)
    other = Cond(text=cond.text.clone(), pooled=cond.pooled, mask=cond.mask)
    other.text[:, 3:] += 10
    method = CLEAR(2, pool=4)
    assert torch.allclose(run(model, (x, t, cond), method), run(model, (x, t, other), method), atol=1e-5)


def test_fresh_weights_are_the_means_and_learned_ones_act_at_their_site():
    model, inputs = model_and_inputs()
    weights = PoolWeights.of(model, 4)
    assert set(weights.tensors()) == {"double_blocks.0.attn", "single_blocks.0.attn", "single_blocks.1.attn"}
    plain = run(model, inputs, CLEAR(2, 4))
    assert torch.equal(run(model, inputs, CLEAR(2, 4, weights=weights)), plain)
    learned = PoolWeights.from_tensors({name: one * 3 for name, one in weights.tensors().items()})
    assert not torch.allclose(run(model, inputs, CLEAR(2, 4, weights=learned)), plain, atol=1e-5)
    assert repr(learned) != repr(weights)
    assert "\n" not in str(CLEAR(2, 4, weights=learned))
    with pytest.raises(UserError, match="another model"):
        run(model, inputs, CLEAR(2, 4, weights=PoolWeights(("blocks.0.attn",), 4)))


def test_attention_is_saved_and_counted():
    model, inputs = model_and_inputs(size=32)
    run(model, inputs, CLEAR(2))
    full = count_flops(lambda: run(model, inputs)).attention
    with smalti.apply(model, CLEAR(2)), torch.no_grad():
        model(*inputs)
        circle = count_flops(lambda: model(*inputs)).attention
    assert circle < full / 5


def test_dense_steps_come_first():
    model, (x, _, cond) = model_and_inputs()
    with smalti.apply(model, CLEAR(2, dense_steps=2)) as handle, torch.no_grad():
        for step in range(4):
            model(x, torch.tensor([1 - step / 4]), cond)
    assert handle.report().methods[0].events == {"gather": 2 * 3}


def test_a_circle_over_everything_never_engages_and_says_so():
    model, inputs = model_and_inputs(size=8)
    with pytest.raises(NeverEngaged, match="over the whole grid"):
        run(model, inputs, CLEAR(radius=10))


def test_a_student_is_drawn_with_in_one_line_and_leaves_no_trace(tmp_path):
    model, inputs = model_and_inputs()
    before = run(model, inputs)
    student, _ = model_and_inputs()
    with torch.no_grad():
        for one in attention_parameters(student).values():
            one.add_(torch.randn_like(one).bfloat16().float() / 8)
    weights = PoolWeights.from_tensors({name: torch.rand(4, 4) / 8 for name in PoolWeights.of(model, 4).tensors()})
    card = {"method": {"radius": 2, "pool": 4}}
    folder = save_deltas(deltas_of(student, model, weights.tensors(), card), tmp_path / "student")
    expected = run(student, inputs, CLEAR(2, 4, weights=weights))
    with distilled(model, folder), torch.no_grad():
        found = model(*inputs)
    assert (found - expected).norm() < 0.02 * (before - expected).norm()
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"radius": 0}, {"radius": -1}, {"radius": float("nan")}, {"pool": 1}, {"dense_steps": -1},
        {"shape": "diamond"}, {"backend": "fast"}, {"weights": PoolWeights(("a",), 4)},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        CLEAR(**settings)
    assert "\n" not in str(error.value)
