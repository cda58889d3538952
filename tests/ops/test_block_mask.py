import pytest
import torch
from torch.nn import functional as F

from smalti.ops.block_mask import (
    BlockLayout,
    block_attention,
    block_attention_with_lse,
    choose,
    flex_mask,
    sparse_cost,
)  # fmt: skip
from smalti.ops.token_order import group_order

CPU = torch.device("cpu")


def random_layout(grid, group, before=0, after=0, equal=None, seed=0):
    order = group_order(grid, group)
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(order.count, order.count, generator=generator) < 0.4
    if equal:
        ranks = torch.rand(order.count, order.count, generator=generator).argsort(1).argsort(1)
        table = ranks < equal
    table |= torch.eye(order.count, dtype=torch.bool)
    return BlockLayout(order, table, before, after)


CASES = [
    {"grid": (1, 4, 6), "group": (1, 2, 2)},
    {"grid": (1, 4, 6), "group": (1, 2, 2), "before": 5},
    {"grid": (1, 5, 7), "group": (1, 2, 3), "after": 3},
    {"grid": (3, 5, 4), "group": (2, 2, 3), "before": 2, "after": 4},
    {"grid": (2, 4, 4), "group": (1, 2, 2), "before": 3, "equal": 3},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [None, "bool", "bias"])
def test_gathering_equals_masked_attention_in_values_and_gradients(case, masked):
    layout = random_layout(**case)
    length = layout.before + len(layout.order.inverse) + layout.after
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(3))
    mask = None
    if masked:
        keep = torch.ones(2, 1, 1, length, dtype=torch.bool)
        keep[1, ..., length - 2 :] = False  # of the text, where it stands behind
        keep[0, ..., :1] = False
        keep[0, ..., layout.before] = True
        mask = keep if masked == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    results = [block_attention(q, k, v, layout, mask, backend=name) for name in ("dense", "gather")]
    assert torch.allclose(*results, atol=1e-5)
    grads = [torch.autograd.grad(one.square().sum(), (q, k, v)) for one in results]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))
    assert not torch.allclose(results[0], F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [None, "bool", "bias"])
@pytest.mark.parametrize("backend", ["dense", "gather"])
def test_the_log_sum_exp_is_that_of_the_attended_keys(case, masked, backend):
    layout = random_layout(**case)
    length = layout.before + len(layout.order.inverse) + layout.after
    q, k, v = (torch.randn(2, 3, length, 8) for _ in range(3))
    keep = torch.ones(2, 1, 1, length, dtype=torch.bool)
    keep[:, ..., :1] = masked is None
    keep[:, ..., layout.before] = True
    mask = {None: None, "bool": keep, "bias": torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)}[masked]
    scores = q @ k.transpose(-1, -2) * 8**-0.5
    scores = scores.masked_fill(~(layout.token_mask(CPU) & keep), -torch.inf)
    found = block_attention_with_lse(q, k, v, layout, mask, backend=backend)
    assert torch.allclose(found.lse, scores.logsumexp(-1), atol=1e-5)
    assert torch.allclose(found.out, block_attention(q, k, v, layout, mask, backend=backend), atol=1e-6)
    assert not torch.allclose(found.lse, (q @ k.transpose(-1, -2) * 8**-0.5).logsumexp(-1), atol=1e-2)


def test_text_rows_are_dense_and_masked_text_is_masked_for_everybody():
    layout = random_layout((1, 4, 4), (1, 2, 2), before=4)
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    keep = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    keep[..., 2:4] = False
    out = block_attention(q, k, v, layout, keep, backend="gather")
    changed = v.clone()
    changed[:, :, 2:4] += 100
    assert torch.equal(block_attention(q, k, changed, layout, keep, backend="gather"), out)
    full = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    assert torch.allclose(out[:, :, :4], full[:, :, :4], atol=1e-6)


def test_a_table_of_all_is_plain_attention_and_chosen_as_such():
    order = group_order((1, 4, 4), (1, 2, 2))
    layout = BlockLayout(order, torch.ones(4, 4, dtype=torch.bool), before=3)
    q, k, v = (torch.randn(1, 2, 19, 8) for _ in range(3))
    full = F.scaled_dot_product_attention(q, k, v)
    assert choose(layout, CPU) == "full"
    assert torch.equal(block_attention(q, k, v, layout), full)
    assert torch.allclose(block_attention(q, k, v, layout, backend="gather"), full, atol=1e-6)


def test_the_cost_counts_text_and_padding():
    order = group_order((1, 8, 8), (1, 2, 2))
    own = BlockLayout(order, torch.eye(16, dtype=torch.bool))
    assert sparse_cost(own) == pytest.approx(1 / 16)
    assert own.attended == pytest.approx(1 / 16)
    assert sparse_cost(BlockLayout(order, own.table, before=64)) == pytest.approx((64 * 68 + 64 * 128) / 128**2)
    ragged = group_order((1, 7, 7), (1, 4, 4))
    assert sparse_cost(BlockLayout(ragged, torch.eye(4, dtype=torch.bool))) == pytest.approx(64 * 16 / 49**2)


@pytest.mark.parametrize("text", [0, 100, 128])
def test_the_flex_mask_is_the_table(text):
    """Checked tile by tile; FlexAttention without a compiler asks only the function of the mask."""
    order = group_order((1, 32, 32), (1, 16, 16))
    layout = BlockLayout(order, random_layout((1, 32, 32), (1, 16, 16)).table, before=text)
    blocks = flex_mask(layout, CPU)
    assert flex_mask(layout, CPU) is blocks
    dense = layout.table.repeat_interleave(2, 0).repeat_interleave(2, 1)
    extra = -(-text // 128)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), F.pad(dense, (0, extra, 0, extra), value=True))
    q, k, v = (torch.randn(1, 1, 1024 + text, 8) for _ in range(3))
    expected = block_attention(q, k, v, layout, backend="dense")
    from torch.nn.attention.flex_attention import flex_attention

    index = torch.cat([order.index + text, torch.arange(text)])
    out, lse = flex_attention(q[:, :, index], k[:, :, index], v[:, :, index], block_mask=blocks, return_lse=True)
    assert torch.allclose(out, expected[:, :, index], atol=1e-5)
    assert torch.allclose(lse, block_attention_with_lse(q, k, v, layout, backend="dense").lse[:, :, index], atol=1e-5)


@pytest.mark.parametrize("table", [torch.ones(3, 3, dtype=torch.bool), torch.ones(4, 4), torch.zeros(4, 4).bool()])
def test_bad_tables_are_refused(table):
    with pytest.raises(ValueError, match=r"table|attends to nothing"):
        BlockLayout(group_order((1, 4, 4), (1, 2, 2)), table)


def test_a_mask_that_differs_between_queries_is_refused():
    q = torch.randn(1, 1, 16, 4)
    layout = random_layout((1, 4, 4), (1, 2, 2))
    with pytest.raises(ValueError, match="mask of keys"):
        block_attention(q, q, q, layout, torch.ones(1, 1, 16, 16, dtype=torch.bool))
