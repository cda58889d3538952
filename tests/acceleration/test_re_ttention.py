import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import smalti
from smalti.acceleration.re_ttention import ReTtention
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import NeverEngaged, UserError
from smalti.core.method import CoreCall, Moment, Site
from smalti.core.protocols import Cond, Segment, TokenLayout
from smalti.evaluation.flops import count_flops
from smalti.ops.local_mask import local_layout

GRID, TEXT = (1, 6, 8), 5
METHOD = ReTtention(density=0.2, full_steps=1, period=4)
JOINT = TokenLayout((Segment("text", TEXT), Segment("image", 48, grid=GRID)))
SITE = Site("blocks", 0, "attn", "attention", 0)


def qkv(seed=0, batch=2):
    torch.manual_seed(seed)
    return [torch.randn(batch, 3, 48 + TEXT, 8) for _ in range(3)]


def call_at(step, tensors, mask=None, keys=JOINT, queries=JOINT):
    """One attention at a step of a run."""

    def attend(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return CoreCall(Moment(step, step, 0.5), SITE, *tensors, mask, None, queries, keys, attend, lambda event: None)


def at(method, state, step, tensors, mask=None):
    """The method's output at a step, text first."""
    return method.at_core(state, call_at(step, tensors, mask))


def dense(tensors, method=METHOD):
    """Full and sparse result and rho from all scores (B, h, L, L)."""
    q, k, v = tensors
    allowed = local_layout(GRID, method.mask, method.density, TEXT).token_mask(q.device)
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    rho = (weights * allowed).sum(-1, keepdim=True)
    return weights @ v, (weights * allowed / rho) @ v, rho


def test_a_refresh_is_full_and_sparse_steps_follow_the_formula():
    """R has the same rho as the sparse result, rho is per query and head, and grows from the second sparse step on."""
    state, first = METHOD.init(), qkv(0)
    full, sparse, rho = dense(first)
    assert torch.equal(at(METHOD, state, 1, first), scaled_dot_product_attention(*first))
    (kept,) = state.values()
    assert kept.rho.shape == (2, 3, 48, 1)
    assert torch.allclose(kept.rho, rho[:, :, TEXT:], atol=1e-5)
    residual = full - rho * sparse
    assert torch.allclose(at(METHOD, state, 2, first), full, atol=1e-5)  # nothing has moved yet
    for step in (3, 4):
        moved = qkv(step)
        expected = (rho + 0.04 * (step - 2)).clamp(max=1) * dense(moved)[1] + residual
        out = at(METHOD, state, step, moved)
        assert torch.allclose(out[:, :, TEXT:], expected[:, :, TEXT:], atol=1e-5)
        assert torch.allclose(out[:, :, :TEXT], dense(moved)[0][:, :, :TEXT], atol=1e-5)  # text attends to everything
    assert torch.equal(at(METHOD, state, 5, moved), scaled_dot_product_attention(*moved))  # the next refresh
    assert state != {"blocks.0.attn#0": kept}


@pytest.mark.parametrize("correction", ["rho", "residual", "none", "reuse"])
def test_comparators_leave_a_part_out(correction):
    method = ReTtention(0.2, 1, 4, correction=correction)
    state, first, moved = method.init(), qkv(0), qkv(1)
    assert torch.equal(at(method, state, 1, first), scaled_dot_product_attention(*first))
    full, sparse, rho = dense(first)
    now = dense(moved)[1]
    expected = {"rho": rho * now, "residual": now + full - sparse, "none": now, "reuse": full}[correction]
    out = at(method, state, 2, moved)
    assert torch.allclose(out[:, :, TEXT:], expected[:, :, TEXT:], atol=1e-5)
    expected_bytes = {"rho": 4 * 288, "residual": 4 * 288 * 8, "none": 0, "reuse": 4 * 6 * 53 * 8}
    assert method.kept(state) == expected_bytes[correction]


def test_rows_sum_to_rho_which_never_exceeds_one():
    method = ReTtention(0.2, 1, 50, drift=0.2, correction="rho")
    state, (q, k, _) = method.init(), qkv()
    ones = (q, k, torch.ones_like(q))
    at(method, state, 1, ones)
    rho = dense(ones)[2][:, :, TEXT:]
    for step in range(2, 12):
        sums = at(method, state, step, ones)[:, :, TEXT:, :1]
        assert torch.allclose(sums, (rho + 0.2 * (step - 2)).clamp(max=1), atol=1e-5)
    assert rho.max() < 0.9
    assert torch.allclose(sums, torch.ones(()), atol=1e-5)


def test_the_residual_before_the_projection_equals_the_one_after_it():
    """Card's form: y = proj(rho * sparse) + [proj(full) - proj(rho * sparse)], with a bias."""
    torch.manual_seed(3)
    projection = torch.nn.Linear(24, 24)

    def project(out):
        return projection(out[:, :, TEXT:].transpose(1, 2).flatten(2))

    state, first, moved = METHOD.init(), qkv(0), qkv(1)
    at(METHOD, state, 1, first)
    full, sparse, rho = dense(first)
    expected = project(rho * dense(moved)[1]) + project(full) - project(rho * sparse)
    assert torch.allclose(project(at(METHOD, state, 2, moved)), expected, atol=1e-5)


def test_all_keys_give_a_rho_of_one_and_no_residual():
    tensors = qkv()
    method = ReTtention(0.999, 0, 4)
    layout = local_layout(GRID, "band", 0.999, TEXT)
    assert layout.table.all()
    sparse = (*tensors, layout, None, None, "gather")
    _, kept = method._full(call_at(0, tensors), None, layout.image, sparse)
    assert torch.allclose(kept.rho, torch.ones(()), atol=1e-6)
    assert kept.residual.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["bool", "bias", "half"])
def test_masked_keys_count_nowhere(kind):
    """A key that may not be attended to is in neither sum; an additive -1e5 would overflow in half precision."""
    state, first, moved = METHOD.init(), qkv(0), qkv(1)
    keep = torch.ones(2, 1, 1, 48 + TEXT, dtype=torch.bool)
    keep[1, ..., 2:TEXT] = False
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    mask = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf) if kind == "bias" else keep
    first, moved = ([one.to(dtype) for one in tensors] for tensors in (first, moved))
    outs = []
    for shift in (0, 50):
        state = METHOD.init()
        for step, (q, k, v) in ((1, first), (2, moved)):
            k, v = (torch.where(keep[:, :, 0, :, None], one, one + shift) for one in (k, v))
            outs.append(at(METHOD, state, step, (q, k, v), mask))
    assert all(torch.isfinite(one).all() for one in outs)
    assert torch.equal(outs[1], outs[3])


def schedule(method, steps):
    """Steps that are full."""
    state, events = method.init(), []
    for step in range(steps):
        tensors = qkv(step, 1)
        if torch.equal(at(method, state, step, tensors), scaled_dot_product_attention(*tensors)):
            events.append(step)
    return events


def test_first_steps_are_full_then_one_in_a_period():
    assert schedule(ReTtention(0.2, 5, 5), 20) == [0, 1, 2, 3, 4, 5, 10, 15]  # the paper's for 20 steps
    assert schedule(ReTtention(0.2, 0, 3), 7) == [0, 3, 6]


def model_and_inputs():
    torch.manual_seed(0)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    cond = Cond(text=torch.randn(2, 5, 12), pooled=torch.randn(2, 10))
    return model, torch.randn(2, 4, 16, 16), cond


@torch.no_grad()
def walk(model, method, x, conds, steps=8):
    """Velocities of a run in which every cond is one branch of guidance."""
    with smalti.apply(model, method) as handle:
        runs = [[model(x * (1 + t), t.expand(2), cond) for cond in conds] for t in torch.linspace(1, 0.9, steps)]
        report = handle.report()
    return runs, report


def test_branches_of_guidance_keep_apart():
    model, x, cond = model_and_inputs()
    other = Cond(text=cond.text.flip(0) * 2, pooled=-cond.pooled)
    both, _ = walk(model, METHOD, x, [cond, other])
    alone, _ = walk(model, METHOD, x, [cond])
    assert all(torch.equal(pair[0], one[0]) for pair, one in zip(both, alone, strict=True))
    shared = [walk(model, ReTtention(0.2, 1, 4, correction="none"), x, [one])[0] for one in (cond, other)]
    assert not torch.equal(shared[0][3][0], shared[1][3][0])


def test_every_run_begins_with_full_steps():
    """A counter of the layer would go on in the second run."""
    model, x, cond = model_and_inputs()
    with smalti.apply(model, METHOD) as handle, torch.no_grad():
        runs = []
        for _ in range(2):
            with handle.run(steps=7):
                runs.append([model(x * t, torch.tensor([t, t]), cond) for t in (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2)])
        events = handle.report().methods[0].events
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    # Full are 0, 1 and 5; of 7 steps 4 are sparse in 3 attentions; 64 tokens in runs of 4, 3 of 16 attended to.
    assert events == {"gather, 18.8% of image keys": 4 * 3 * 2}


def test_work_is_skipped_and_the_correction_comes_closer():
    model, x, cond = model_and_inputs()
    plain = walk(model, ReTtention.neutral(), x, [cond])[0]

    def error(correction):
        runs = walk(model, ReTtention(0.1, 2, 6, correction=correction), x, [cond])[0]
        return sum((a[0] - b[0]).norm().item() for a, b in zip(runs, plain, strict=True))

    assert error("both") < 0.6 * error("none")
    costs = [
        count_flops(lambda method=method: walk(model, method, x, [cond])).attention
        for method in (ReTtention(0.1, 2, 6), ReTtention.neutral())
    ]
    assert costs[0] < 0.8 * costs[1]


def test_cross_attention_is_held_between_full_steps():
    image, text = TokenLayout((Segment("image", 48, grid=GRID),)), TokenLayout((Segment("text", TEXT),))
    for method, is_same in ((ReTtention(0.2, 1, 4, cross=True), True), (METHOD, False)):
        state, outs = method.init(), []
        for step in (1, 2, 3):
            q, k, v = qkv(step)
            tensors = (q[:, :, TEXT:], k[:, :, :TEXT], v[:, :, :TEXT])
            outs.append(method.at_core(state, call_at(step, tensors, keys=text, queries=image)))
        assert torch.equal(outs[0], outs[2]) == is_same


def test_a_run_of_full_steps_alone_says_so():
    model, x, cond = model_and_inputs()
    with pytest.raises(NeverEngaged, match="the first 9 steps"):
        walk(model, ReTtention(0.2, 9, 4), x, [cond])


@pytest.mark.parametrize(
    "settings",
    [{"density": 0}, {"density": 1.5}, {"full_steps": -1}, {"period": 0}, {"drift": -0.1}, {"mask": "ring"},
     {"correction": "half"}],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        ReTtention(**settings)
    assert "\n" not in str(error.value)
