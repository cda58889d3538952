import pytest
import torch

from smalti.ops.token_order import group_order


@pytest.mark.parametrize(
    ("grid", "group"), [((1, 4, 6), (1, 2, 2)), ((3, 5, 7), (2, 2, 4)), ((1, 3, 3), (1, 9, 9)), ((2, 4, 4), (1, 1, 1))]
)
def test_gather_and_scatter_are_inverse_and_groups_are_neighbours(grid, group):
    order = group_order(grid, group)
    tokens = torch.arange(grid[0] * grid[1] * grid[2])
    x = tokens[None, :, None].float()
    grouped = order.gather(x)
    assert grouped.shape == (1, order.count, order.length, 1)
    assert torch.equal(order.scatter(grouped), x)
    assert order.is_real.sum() == len(tokens)
    for index, members in enumerate(grouped[0, :, :, 0].long()):
        real = members[order.is_real.reshape(order.count, -1)[index]]
        t, h, w = real // (grid[1] * grid[2]), real // grid[2] % grid[1], real % grid[2]
        for axis, side in zip((t, h, w), order.group, strict=True):
            assert len((axis // side).unique()) == 1


def test_orders_are_kept_and_bad_sizes_refused():
    assert group_order((1, 4, 4), (1, 2, 2)) is group_order((1, 4, 4), (1, 2, 2))
    with pytest.raises(ValueError, match="at least 1"):
        group_order((1, 4, 4), (1, 0, 2))
