import pytest
import torch
from torch.nn import functional as F

from smalti.ops.circle_mask import (
    TILES,
    Pooled,
    choose,
    circle_attention,
    circle_layout,
    circle_mask,
    flex_mask,
    is_near,
    pool_tokens,
)

CPU = torch.device("cpu")
CASES = [
    {"grid": (1, 6, 8), "radius": 3},
    {"grid": (1, 16, 16), "radius": 3, "before": 16},
    {"grid": (1, 5, 7), "radius": 2.5, "before": 3, "after": 2},
    {"grid": (2, 6, 5), "radius": 2, "after": 4},
    {"grid": (1, 9, 9), "radius": 1, "before": 4, "shape": "square"},
    {"grid": (1, 7, 9), "radius": 4, "before": 1, "group": (1, 3, 4)},
]


def keeps(query, key, text, height, width, radius, cells=0):
    """The paper's rule for one query and one key, text first."""
    stop = text + height * width
    is_image_query, is_image_key = query >= text, text <= key < stop
    if not is_image_query:
        return key < stop
    if not is_image_key:
        return True
    (y, x), (v, u) = divmod(query - text, width), divmod(key - text, width)
    return (y - v) ** 2 + (x - u) ** 2 < radius**2


@pytest.mark.parametrize(
    ("height", "width", "radius", "text", "cells"), [(5, 7, 3, 4, 0), (4, 4, 2, 3, 5), (6, 3, 1, 0, 0)]
)
def test_the_mask_is_the_rule_for_every_pair(height, width, radius, text, cells):
    mask = circle_mask((1, height, width), radius, before=text, pooled=cells)
    length = text + height * width
    assert mask.shape == (length, length + cells)
    expected = [[keeps(q, k, text, height, width, radius) for k in range(length + cells)] for q in range(length)]
    assert torch.equal(mask, torch.tensor(expected))


def test_the_circle_is_strict_and_round():
    down, right = torch.tensor([3, 2, 2, 0]), torch.tensor([0, 2, 1, 3])
    assert is_near(down, right, 3).tolist() == [False, True, True, False]
    assert is_near(down, right, 2.8).tolist() == [False, False, True, False]
    corners = (
        is_near(torch.tensor([3]), torch.tensor([3]), 4),
        is_near(torch.tensor([3]), torch.tensor([3]), 4, "square"),
    )
    assert [bool(one) for one in corners] == [False, True]


def test_nothing_wraps_and_a_corner_sees_fewer():
    mask = circle_mask((1, 8, 8), 3)
    assert mask[27].sum() == 25
    assert mask[0].sum() == 9
    assert not mask[7, 8]  # the end of a row and the start of the next


def test_a_clip_has_the_same_circle_in_every_frame():
    one, many = circle_mask((1, 4, 5), 2), circle_mask((3, 4, 5), 2)
    assert torch.equal(many, one.repeat(3, 3))


def test_text_stays_dense_both_ways_and_sees_no_cell():
    mask = circle_mask((1, 4, 4), 1, before=3, after=2, pooled=4)
    text = [0, 1, 2, 19, 20]
    assert mask[text, :21].all()
    assert mask[:, text].all()
    assert not mask[text, 21:].any()
    assert mask[3:19, 21:].all()


def test_masks_and_layouts_are_kept_by_shape():
    assert circle_mask((1, 4, 5), 2, 3) is circle_mask((1, 4, 5), 2, 3)
    assert circle_layout((1, 4, 5), 2, 3) is circle_layout((1, 4, 5), 2, 3)
    assert circle_layout((1, 5, 4), 2, 3) is not circle_layout((1, 4, 5), 2, 3)


def inputs(layout, cells=True):
    length = layout.blocks.before + len(layout.blocks.order.inverse) + layout.blocks.after
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(3))
    weight = torch.rand(3, 3) / 9
    image = layout.blocks.image
    pooled = Pooled(*(pool_tokens(x[:, :, image], layout.blocks.order.grid, weight) for x in (k, v))) if cells else None
    return q, k, v, pooled


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [None, "bool", "bias"])
@pytest.mark.parametrize("cells", [False, True])
def test_gathering_equals_the_token_mask_in_values_and_gradients(case, masked, cells):
    torch.manual_seed(0)
    layout = circle_layout(**case)
    q, k, v, pooled = inputs(layout, cells)
    mask = None
    if masked:
        keep = torch.ones(2, 1, 1, q.shape[2], dtype=torch.bool)
        keep[1, ..., : layout.blocks.before // 2] = False
        keep[0, ..., q.shape[2] - layout.blocks.after // 2 :] = False
        mask = keep if masked == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    results = [circle_attention(q, k, v, layout, mask, None, pooled, name) for name in ("dense", "gather")]
    assert torch.allclose(*results, atol=1e-5)
    grads = [torch.autograd.grad(one.square().sum(), (q, k, v), retain_graph=True) for one in results]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))
    assert not torch.allclose(results[0], F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-3)


def test_the_dense_form_is_plain_attention_under_the_mask():
    layout = circle_layout((1, 5, 6), 2.2, before=4)
    q, k, v, _ = inputs(layout, cells=False)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=circle_mask((1, 5, 6), 2.2, before=4))
    assert torch.allclose(circle_attention(q, k, v, layout, backend="gather"), expected, atol=1e-5)


def test_a_cell_is_the_mean_at_first_and_one_weight_serves_keys_and_values():
    x = torch.randn(2, 3, 64, 4)
    mean = pool_tokens(x, (1, 8, 8), torch.full((4, 4), 1 / 16))
    field = x.transpose(2, 3).unflatten(3, (8, 8)).flatten(0, 1)
    assert torch.allclose(mean, F.avg_pool2d(field, 4).unflatten(0, (2, 3)).flatten(3).transpose(2, 3), atol=1e-6)
    weight = torch.rand(4, 4)
    kernel = weight.expand(4, 1, 4, 4)
    summed = F.conv2d(field, kernel, stride=4, groups=4).unflatten(0, (2, 3)).flatten(3).transpose(2, 3)
    assert torch.allclose(pool_tokens(x, (1, 8, 8), weight), summed, atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 6, 7), (2, 3, 2), (1, 1, 1)])
def test_a_cell_that_the_border_cuts_is_the_mean_of_what_exists(grid):
    tokens = grid[0] * grid[1] * grid[2]
    cells = pool_tokens(torch.full((1, 1, tokens, 2), 3.0), grid, torch.full((4, 4), 1 / 16))
    assert cells.shape[2] == grid[0] * -(-grid[1] // 4) * -(-grid[2] // 4)
    assert torch.allclose(cells, torch.tensor(3.0))


def test_the_cheaper_way_is_chosen():
    assert choose(circle_layout((1, 16, 16), 3, 16), CPU) == "gather"
    assert choose(circle_layout((1, 16, 16), 14, 16), CPU) == "dense"
    tiled = circle_layout((1, 32, 32), 4, 16, group=TILES)
    assert choose(tiled, torch.device("cuda")) == "flex"
    assert choose(tiled, torch.device("cuda"), mask=torch.ones(1, 1, 1, 1040)) == "gather"


@pytest.mark.parametrize(("text", "cells"), [(0, 0), (100, 32), (128, 0), (130, 64)])
def test_flex_tiles_are_full_partial_or_left_out_as_the_mask_says(text, cells):
    layout = circle_layout((1, 32, 48), 9, before=text, group=TILES)
    order = layout.blocks.order
    tiles = flex_mask(layout, cells, CPU)
    assert flex_mask(layout, cells, CPU) is tiles
    index = torch.cat([order.index + text, torch.arange(text)])
    exact = circle_mask((1, 32, 48), 9, before=text, pooled=cells)
    exact = exact[index][:, torch.cat([index, torch.arange(len(index), len(index) + cells)])]
    exact = F.pad(exact, (0, -exact.shape[1] % 128, 0, -exact.shape[0] % 128))
    cut = exact.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2).flatten(2)
    some, whole = cut.any(2), cut.all(2)
    rows, columns = some.shape

    def listed(counts, indices):
        table = torch.zeros(rows, columns, dtype=torch.bool)
        for row in range(rows):
            table[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
        return table

    partly = listed(tiles.kv_num_blocks, tiles.kv_indices)
    wholly = listed(tiles.full_kv_num_blocks, tiles.full_kv_indices)
    real_rows = rows if text % 128 == 0 else rows - 1
    assert torch.equal(wholly[:real_rows], whole[:real_rows])
    assert torch.equal(partly | wholly, some)
    assert not some.all()

    q = torch.randn(1, 1, len(index), 8)
    k, v = (torch.randn(1, 1, len(index) + cells, 8) for _ in range(2))
    from torch.nn.attention.flex_attention import flex_attention

    out = flex_attention(q, k, v, block_mask=tiles)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=exact[: len(index), : len(index) + cells])
    assert torch.allclose(out, expected, atol=1e-5)


def test_what_cannot_be_is_refused():
    layout = circle_layout((1, 8, 8), 2)
    q = torch.randn(1, 1, 64, 8)
    with pytest.raises(ValueError, match="mask of keys"):
        circle_attention(q, q, q, layout, torch.ones(1, 1, 64, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="no mask of keys"):
        circle_attention(q, q, q, layout, torch.ones(1, 1, 1, 64, dtype=torch.bool), backend="flex")
    with pytest.raises(ValueError, match="whole tiles"):
        flex_mask(layout, 0, CPU)
