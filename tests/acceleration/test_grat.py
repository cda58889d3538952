import pytest
import torch

import smalti
from smalti.acceleration.grat import GRAT, region_layout, region_table
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import NeverEngaged, UserError
from smalti.core.protocols import Cond
from smalti.ops.token_order import group_order


def table(groups, region):
    order = group_order(groups, (1, 1, 1))
    return region_table(order, region).reshape(*groups, *groups)


@pytest.mark.parametrize(
    ("place", "rows", "columns"), [((2, 3), (1, 4), (2, 5)), ((0, 0), (0, 3), (0, 3)), ((5, 6), (3, 6), (4, 7))]
)
def test_a_window_is_moved_inwards_at_the_border(place, rows, columns):
    attended = table((1, 6, 7), "block:1")[0, place[0], place[1], 0]
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[rows[0] : rows[1], columns[0] : columns[1]] = True
    assert torch.equal(attended, expected)


def test_every_group_of_a_window_and_of_a_cross_sees_equally_many():
    counts = {"block:1": 9, "block:2": 25, "cross": 12, "block:1+cross": 16}
    for region, count in counts.items():
        assert (table((1, 6, 7), region).reshape(42, 42).sum(1) == count).all()


def test_a_cross_in_a_picture_is_row_and_column():
    attended = table((1, 4, 5), "cross")[0, 1, 2, 0]
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[1], expected[:, 2] = True, True
    assert torch.equal(attended, expected)


def test_a_cross_in_video_is_a_union_of_planes():
    groups = (3, 4, 5)
    attended = table(groups, "cross")[1, 2, 3]
    expected = torch.zeros(groups, dtype=torch.bool)
    expected[1], expected[:, 2], expected[:, :, 3] = True, True, True
    assert torch.equal(attended, expected)
    share = region_layout(groups, (1, 1, 1), "cross").attended
    assert share == pytest.approx(1 - (2 / 3) * (3 / 4) * (4 / 5))


def test_comparators_attend_to_as_many_groups_and_to_themselves():
    for region in ("random:9", "strided:9"):
        found = table((1, 6, 6), region).reshape(36, 36)
        assert found.diagonal().all()
        assert (found.sum(1) == 9).all()


def model_and_inputs(size=16, masked=False):
    torch.manual_seed(0)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
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
def test_a_radius_that_covers_all_groups_is_full_attention(masked):
    model, inputs = model_and_inputs(masked=masked)
    full = run(model, inputs)
    with smalti.apply(model, GRAT(group=(1, 2, 2), region="block:4")) as handle, torch.no_grad():
        assert torch.equal(model(*inputs), full)
        handle.remove(check=False)
    from smalti.ops.block_mask import block_attention

    layout = region_layout((1, 8, 8), (1, 2, 2), "block:4", 5)
    q, k, v = (torch.randn(1, 2, 69, 8) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(block_attention(q, k, v, layout, backend="gather"), dense, atol=1e-5)


def test_masked_text_changes_nothing_for_image_queries():
    model, (x, t, cond) = model_and_inputs(masked=True)
    method = GRAT(group=(1, 2, 2), region="cross")
    other = Cond(text=cond.text.clone(), pooled=cond.pooled, mask=cond.mask)
    other.text[:, 3:] += 10
    assert torch.allclose(run(model, (x, t, cond), method), run(model, (x, t, other), method), atol=1e-5)
    assert not torch.allclose(run(model, (x, t, cond), method), run(model, (x, t, cond)), atol=1e-5)


def test_a_grid_that_groups_do_not_divide_is_padded_away():
    model, inputs = model_and_inputs(size=18)  # 9 x 9 tokens
    out = run(model, inputs, GRAT(group=(1, 2, 2), region="block:0"))
    assert torch.isfinite(out).all()
    assert not torch.equal(out, run(model, inputs))


def test_few_groups_bring_nothing_and_it_says_so():
    model, inputs = model_and_inputs(size=8)  # 4 x 4 tokens: one group of 4 x 4
    with pytest.raises(NeverEngaged, match="would have cost as much as plain attention"):
        run(model, inputs, GRAT(group=(1, 4, 4), region="cross"))


def test_dense_steps_come_first():
    model, (x, _, cond) = model_and_inputs()
    method = GRAT(group=(1, 2, 2), region="cross", dense_steps=2)
    with smalti.apply(model, method) as handle, torch.no_grad():
        for step in range(4):
            model(x, torch.tensor([1 - step / 4]), cond)
    assert handle.report().methods[0].events == {"gather": 2 * 3}


@pytest.mark.parametrize(
    "settings", [{"group": (1, 0, 2)}, {"region": "diamond"}, {"region": "block"}, {"dense_steps": -1}, {"region": ""}]
)
def test_bad_settings_are_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        GRAT(**settings)
    assert "\n" not in str(error.value)
