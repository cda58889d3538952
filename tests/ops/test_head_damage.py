import pytest
import torch
from torch.nn import functional as F

from smalti.core.errors import Refusal, UserError
from smalti.ops.head_damage import _between, check_kind, soften, soften_maps

KINDS = ["identity", "uniform", "mean query", "temperature:3", "zero"]


def inputs(heads=3, length=7, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, length, 4, generator=generator) for _ in range(3)]


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)


def image_rows(length=7):
    return (torch.arange(length) >= 3)[:, None]


MASKS = {
    "none": None,
    "bool": (torch.arange(7) != 2)[None, None, None].expand(2, 1, 1, 7),
    "bias": torch.where(torch.arange(7) == 1, -torch.inf, 0.3)[None, None, None],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("target", [None, "image"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_path_equals_written_out_maps(kind, target, mask):
    q, k, v = inputs()
    rows = image_rows() if target else None
    strength = torch.tensor([0.0, 0.3, 1.0])[:, None, None]
    fused = soften(q, k, v, MASKS[mask], strength, attend, kind, rows)
    written = soften_maps(q, k, v, MASKS[mask], strength, 0.7, kind, rows)
    assert torch.allclose(fused, written, atol=1e-5)
    assert torch.equal(fused[:, 0], attend(q, k, v, MASKS[mask])[:, 0])
    assert not torch.allclose(fused[:, 1], attend(q, k, v, MASKS[mask])[:, 1], atol=1e-3)


def test_identity_at_full_strength_is_the_value_of_each_token():
    q, k, v = inputs()
    out = soften(q, k, v, None, torch.ones(3, 1, 1), attend)
    assert torch.equal(out, v)
    out = soften(q, k, v, None, torch.ones(3, 1, 1), attend, target=image_rows())
    assert torch.equal(out[:, :, 3:], v[:, :, 3:])
    assert torch.equal(out[:, :, :3], attend(q, k, v, None)[:, :, :3])


def test_uniform_attention_is_the_mean_value_and_zero_leaves_the_text():
    q, k, v = inputs()
    full = torch.ones(3, 1, 1)
    out = soften(q, k, v, None, full, attend, "uniform")
    assert torch.allclose(out, v.mean(2, keepdim=True).expand_as(v), atol=1e-6)
    out = soften(q, k, v, None, full, attend, "zero", image_rows())
    weights = (0.7 * q @ k.mT).softmax(-1)
    assert torch.allclose(out[:, :, 3:], (weights[..., :3] @ v[:, :, :3])[:, :, 3:], atol=1e-6)
    assert not soften(q, k, v, None, full, attend, "zero").any()


def test_rows_of_a_batch_have_strengths_of_their_own():
    q, k, v = inputs()
    strength = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.5]])[:, :, None, None]
    out, plain = soften(q, k, v, None, strength, attend), attend(q, k, v, None)
    assert torch.equal(out[0], plain[0])
    assert torch.equal(out[1, 0], v[1, 0])
    assert torch.allclose(out[1, 2], (plain[1, 2] + v[1, 2]) / 2)


@pytest.mark.parametrize("blend", ["log-linear", "slerp"])
@pytest.mark.parametrize("kind", KINDS[:4])
def test_other_paths_begin_and_end_at_the_same_maps(blend, kind):
    q, k, v = inputs()
    at = {u: soften_maps(q, k, v, None, torch.full((3, 1, 1), u), 0.7, kind, None, blend) for u in (0.0, 0.5, 1.0)}
    linear = {u: soften_maps(q, k, v, None, torch.full((3, 1, 1), u), 0.7, kind) for u in (0.0, 0.5, 1.0)}
    assert torch.allclose(at[0.0], linear[0.0], atol=1e-3)
    assert torch.allclose(at[1.0], linear[1.0], atol=1e-3)
    assert (at[0.5] - linear[0.5]).abs().max() > 1e-3
    ones = soften_maps(q, k, torch.ones_like(v), None, torch.full((3, 1, 1), 0.5), 0.7, kind, None, blend)
    assert torch.allclose(ones, torch.ones_like(v), atol=1e-4)  # rows of the map sum to one


def test_halfway_on_the_great_circle_is_as_near_to_both():
    one, other = (torch.randn(9, generator=torch.Generator().manual_seed(i)).softmax(0) for i in (0, 1))
    middle = _between(one[None], other[None], torch.tensor([[0.5]]), "slerp")[0]
    near = [float((middle.sqrt() * end.sqrt()).sum().acos()) for end in (one, other)]
    assert near[0] == pytest.approx(near[1], abs=1e-5)
    assert sum(near) == pytest.approx(float((one.sqrt() * other.sqrt()).sum().acos()), abs=1e-4)


def test_what_cannot_be_is_refused():
    q, k, v = inputs()
    with pytest.raises(UserError, match="no slerp blend"):
        soften_maps(q, k, v, None, torch.ones(3, 1, 1), kind="zero", blend="slerp")
    big = torch.empty(1, 24, 8192, 1, device="meta")
    with pytest.raises(Refusal, match="GiB"):
        soften_maps(big, big, big, None, torch.ones(24, 1, 1), blend="slerp")
    for kind in ("identty", "temperature", "temperature:0", "temperature:x", "temperature:T"):
        with pytest.raises(UserError, match="unknown kind"):
            check_kind(kind)
