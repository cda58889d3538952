import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from smalti.ops.head_blocks import (
    choose,
    flex_mask,
    flex_order,
    head_block_attention,
    head_blocks,
    sparse_cost,
    token_mask,
)
from smalti.ops.token_order import group_order

CPU = torch.device("cpu")


def random_blocks(grid, group, before=0, after=0, batch=2, heads=3, share=0.4):
    """Blocks whose rows attend to unequally many groups, another table for every head."""
    order = group_order(grid, group)
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(batch, heads, order.count, order.count, generator=generator) < share
    return head_blocks(order, table, before, after)


def qkv(blocks, batch=2, heads=3, width=8, **settings):
    torch.manual_seed(1)
    length = len(blocks.order.inverse) + blocks.before + blocks.after
    return [torch.randn(batch, heads, length, width, **settings) for _ in range(3)]


def key_mask(blocks, kind):
    """Some text and image tokens masked, differently in both samples."""
    length = len(blocks.order.inverse) + blocks.before + blocks.after
    keep = torch.ones(2, 1, 1, length, dtype=torch.bool)
    keep[1, ..., length - 2 :] = False
    keep[0, ..., :1] = False
    if blocks.order.length > 1:
        own = torch.zeros_like(keep)
        own[..., blocks.before + blocks.order.index.unflatten(0, (blocks.order.count, -1))[:, 0]] = True
        keep |= own  # every group keeps a key of its own
    return keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)


CASES = [
    {"grid": (1, 4, 6), "group": (1, 2, 2)},
    {"grid": (1, 5, 7), "group": (1, 2, 3), "after": 3},
    {"grid": (3, 5, 4), "group": (2, 2, 3), "before": 2, "after": 4},
    {"grid": (2, 4, 4), "group": (1, 2, 2), "before": 3, "batch": 1},
    {"grid": (1, 5, 6), "group": (1, 2, 2), "before": 3, "batch": 1, "heads": 1},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [None, "bool", "bias"])
def test_gathering_equals_masked_attention_in_values_and_gradients(case, masked):
    blocks = random_blocks(**case)
    assert len(blocks.table.sum(-1).unique()) > 1
    q, k, v = qkv(blocks, requires_grad=True)
    mask = key_mask(blocks, masked) if masked else None
    results = [head_block_attention(q, k, v, blocks, mask, backend=name) for name in ("dense", "gather")]
    assert torch.allclose(*results, atol=1e-5)
    grads = [torch.autograd.grad(one.square().sum(), (q, k, v)) for one in results]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))
    assert not torch.allclose(results[0], F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-3)


def test_pieces_do_not_change_the_result(monkeypatch):
    blocks = random_blocks(**CASES[2])
    q, k, v = qkv(blocks)
    whole = head_block_attention(q, k, v, blocks, scale=0.7, backend="gather")
    monkeypatch.setattr("smalti.ops.head_blocks.GATHERED", 1)
    assert torch.allclose(head_block_attention(q, k, v, blocks, scale=0.7, backend="gather"), whole, atol=1e-6)
    assert torch.allclose(head_block_attention(q, k, v, blocks, scale=0.7, backend="dense"), whole, atol=1e-5)


def test_every_head_of_every_sample_has_its_own_table():
    """Each is what it is alone: branches of guidance in one batch do not share blocks."""
    blocks = random_blocks(**CASES[2])
    q, k, v = qkv(blocks)
    out = head_block_attention(q, k, v, blocks, backend="gather")
    for b in range(2):
        for h in range(3):
            own = head_blocks(blocks.order, blocks.table[b : b + 1, h : h + 1], 2, 4)
            one = [x[b : b + 1, h : h + 1] for x in (q, k, v)]
            assert torch.allclose(head_block_attention(*one, own, backend="gather")[0, 0], out[b, h], atol=1e-6)


def test_a_table_of_all_is_plain_attention_and_chosen_as_such():
    order = group_order((1, 4, 4), (1, 2, 2))
    blocks = head_blocks(order, torch.ones(1, 1, 4, 4, dtype=torch.bool), before=3)
    q, k, v = qkv(blocks)
    full = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(head_block_attention(q, k, v, blocks), full)
    for backend in ("gather", "dense"):
        assert torch.allclose(head_block_attention(q, k, v, blocks, backend=backend), full, atol=1e-6)


def test_an_empty_table_leaves_every_group_itself():
    order = group_order((1, 4, 4), (1, 2, 2))
    blocks = head_blocks(order, torch.zeros(2, 3, 4, 4, dtype=torch.bool))
    q, k, v = qkv(blocks)
    grouped = [order.gather(x) for x in (q, k, v)]
    expected = order.scatter(F.scaled_dot_product_attention(*grouped))
    assert torch.allclose(head_block_attention(q, k, v, blocks), expected, atol=1e-6)


def test_text_rows_are_dense_and_masked_text_is_masked_for_everybody():
    blocks = random_blocks((1, 4, 4), (1, 2, 2), before=4)
    q, k, v = qkv(blocks)
    keep = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    keep[0, ..., 2:4] = False
    out = head_block_attention(q, k, v, blocks, keep, backend="gather")
    changed = v.clone()
    changed[:, :, 2:4] += 100
    other = head_block_attention(q, k, changed, blocks, keep, backend="gather")
    assert torch.equal(other[0], out[0])
    assert not torch.allclose(other[1], out[1])
    full = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    assert torch.allclose(out[:, :, :4], full[:, :, :4], atol=1e-6)


def test_the_cost_counts_text_and_padding():
    order = group_order((1, 8, 8), (1, 2, 2))
    assert sparse_cost(order, 1 / 16, 0) == pytest.approx(1 / 16)
    assert sparse_cost(order, 1 / 16, 64) == pytest.approx((64 * 68 + 64 * 128) / 128**2)
    assert sparse_cost(group_order((1, 7, 7), (1, 4, 4)), 1 / 4, 0) == pytest.approx(64 * 16 / 49**2)
    assert choose(order, 1.0, 0, CPU) == "full"
    assert choose(order, 0.5, 0, CPU) == "gather"
    tiled, gpu = group_order((1, 20, 40), (1, 8, 16)), torch.device("cuda")
    assert choose(tiled, 0.2, 8, gpu) == "flex"
    assert choose(tiled, 0.2, 8, gpu, torch.zeros(1, 1, 1, 808)) == "gather"


@pytest.mark.parametrize("after", [0, 100, 128])
@pytest.mark.parametrize(("grid", "masked"), [((1, 16, 32), False), ((1, 16, 32), True), ((1, 12, 30), False)])
def test_the_flex_mask_is_the_table_and_the_real_keys(grid, masked, after):
    """FlexAttention without a compiler asks only the function of the mask; its tiles are checked one by one."""
    blocks = random_blocks(grid, (1, 8, 16), after=after, batch=1, heads=2)
    q, k, v = qkv(blocks, batch=2, heads=2)
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, q.shape[2], dtype=torch.bool)
        mask[1, ..., -50:] = False
    made = flex_mask(blocks, 2, 2, mask, CPU)
    index = flex_order(blocks)
    out = flex_attention(*(x[:, :, index] for x in (q, k, v)), block_mask=made)
    expected = head_block_attention(q, k, v, blocks, mask, backend="dense")
    places = torch.cat([blocks.order.inverse, torch.arange(len(blocks.order.index), len(blocks.order.index) + after)])
    assert torch.allclose(out[:, :, places], expected, atol=1e-5)

    asked = made.mask_mod(
        torch.arange(2)[:, None, None, None], torch.arange(2)[:, None, None], torch.arange(len(index))[:, None],
        torch.arange(len(index)),
    )  # fmt: skip
    shares = asked.float().unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).mean((3, 5))  # (B, h, T, T)
    listed = torch.zeros(2, *shares.shape)
    for row, (counts, columns) in enumerate(
        ((made.kv_num_blocks, made.kv_indices), (made.full_kv_num_blocks, made.full_kv_indices))
    ):
        for place in torch.cartesian_prod(*(torch.arange(side) for side in counts.shape)).tolist():
            listed[(row, *place)][columns[tuple(place)][: counts[tuple(place)]].long()] = 1
    assert torch.equal(listed[1].bool(), shares == 1)
    assert (listed[0].bool() >= ((shares > 0) & (shares < 1))).all()  # an empty tile may be listed, never a whole one
    assert not (listed[0].bool() & (shares == 1)).any()


def test_the_token_mask_is_the_table_by_coordinates():
    blocks = random_blocks((2, 3, 5), (1, 2, 2), before=1, after=2)
    mask = token_mask(blocks, CPU)
    assert mask[:, :, [0, 31, 32]].all()
    assert mask[..., [0, 31, 32]].all()
    places = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5))
    group = places[:, 0] * 6 + places[:, 1] // 2 * 3 + places[:, 2] // 2
    for query, key in ((0, 29), (7, 14), (18, 3)):
        assert torch.equal(mask[:, :, query + 1, key + 1], blocks.table[:, :, group[query], group[key]])


@pytest.mark.parametrize("table", [torch.ones(1, 1, 3, 3).bool(), torch.ones(1, 1, 4, 4), torch.ones(4, 4).bool()])
def test_bad_tables_are_refused(table):
    with pytest.raises(ValueError, match="a table of 4 groups"):
        head_blocks(group_order((1, 4, 4), (1, 2, 2)), table)


def test_masks_that_do_not_fit_are_refused():
    blocks = random_blocks((1, 4, 4), (1, 2, 2))
    q, k, v = qkv(blocks)
    with pytest.raises(ValueError, match="mask of keys"):
        head_block_attention(q, k, v, blocks, torch.ones(1, 1, 16, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="choose gather"):
        head_block_attention(q, k, v, blocks, torch.zeros(1, 1, 1, 16), backend="flex")


@pytest.mark.slow
@torch.no_grad()
def test_flex_equals_masked_attention_and_other_tables_need_no_compiling():
    counters.clear()
    for seed in range(2):
        torch.manual_seed(seed)
        order = group_order((1, 20, 40), (1, 8, 16))
        blocks = head_blocks(order, torch.rand(2, 3, order.count, order.count) < 0.4, before=2, after=40)
        q, k, v = qkv(blocks, width=32)
        mask = torch.ones(2, 1, 1, 842, dtype=torch.bool)
        mask[1, ..., -20 - seed :] = False
        results = [head_block_attention(q, k, v, blocks, mask, backend=name) for name in ("dense", "flex")]
        assert torch.allclose(*results, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    one = head_blocks(blocks.order, blocks.table[:1, :1], before=2, after=40)  # shared by all, kept for the next call
    for some in (None, mask, None):
        results = [head_block_attention(q, k, v, one, some, backend=name) for name in ("dense", "flex")]
        assert torch.allclose(*results, atol=1e-5)
    assert [key[0] for key in one.kept] == ["flex"]
    assert one.nbytes > 2 * one.table.nbytes
