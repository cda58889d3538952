import pytest
import torch

from smalti.core.errors import UserError
from smalti.ops.circle_halo import split_circle_attention
from smalti.ops.circle_mask import Pooled, circle_attention, circle_layout, pool_tokens


def qkv(grid, text):
    torch.manual_seed(0)
    return [torch.randn(2, 3, text + grid[0] * grid[1], 8) for _ in range(3)]


def whole(q, k, v, grid, radius, text, weight):
    layout = circle_layout((1, *grid), radius, text)
    pooled = None
    if weight is not None:
        pooled = Pooled(*(pool_tokens(one[:, :, text:], (1, *grid), weight) for one in (k, v)))
    return circle_attention(q, k, v, layout, pooled=pooled, backend="dense")


@pytest.mark.parametrize(
    ("devices", "radius", "text", "pool"), [(2, 3, 5, None), (4, 3, 5, 2), (4, 6.5, 0, 2), (8, 1, 3, None)]
)
def test_parts_with_a_halo_equal_the_whole(devices, radius, text, pool):
    grid = (16, 6)
    q, k, v = qkv(grid, text)
    weight = None if pool is None else torch.rand(pool, pool)
    split = split_circle_attention(q, k, v, grid, radius, devices, text, weight)
    assert torch.allclose(split.out, whole(q, k, v, grid, radius, text, weight), atol=1e-5)


def test_a_halo_of_the_reach_is_received_and_no_more():
    grid = (16, 4)
    split = split_circle_attention(*qkv(grid, 2), grid, 3, 4, 2)
    assert split.received == (2, 4, 4, 2)
    assert split_circle_attention(*qkv(grid, 2), grid, 1, 4, 2).received == (0, 0, 0, 0)


def test_the_papers_mean_of_text_is_near_but_no_equal():
    grid = (16, 4)
    q, k, v = qkv(grid, 5)
    exact = whole(q, k, v, grid, 3, 5, None)
    mean = split_circle_attention(q, k, v, grid, 3, 4, 5, text="mean").out
    assert torch.allclose(mean[:, :, 5:], exact[:, :, 5:], atol=1e-5)
    apart = (mean[:, :, :5] - exact[:, :, :5]).norm() / exact[:, :, :5].norm()
    assert 0.01 < apart < 0.8


@pytest.mark.parametrize(("devices", "pool"), [(3, None), (0, None), (8, 4)])
def test_rows_that_cannot_be_dealt_out_are_refused(devices, pool):
    weight = None if pool is None else torch.ones(pool, pool)
    with pytest.raises(UserError, match="whole cells"):
        split_circle_attention(*qkv((16, 4), 0), (16, 4), 3, devices, 0, weight)
