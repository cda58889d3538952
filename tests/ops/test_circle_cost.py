import pytest

from smalti.ops.circle_cost import circle_cost, near_pairs
from smalti.ops.circle_mask import circle_layout, circle_mask


@pytest.mark.parametrize(
    ("grid", "radius", "shape"), [((1, 5, 7), 2.5, "circle"), ((2, 6, 4), 3, "square"), ((1, 4, 4), 9, "circle")]
)
def test_pairs_are_counted_as_the_mask_has_them(grid, radius, shape):
    assert near_pairs(grid, radius, shape) == circle_mask(grid, radius, shape=shape).sum()


@pytest.mark.parametrize("pool", [None, 4])
def test_the_exact_products_are_those_of_the_mask(pool):
    cells = 0 if pool is None else 2 * 3
    cost = circle_cost(circle_layout((1, 6, 9), 3, before=5), pool)
    assert cost.exact == circle_mask((1, 6, 9), 3, before=5, pooled=cells).sum()
    assert cost.full == (54 + 5) ** 2
    assert cost.exact <= cost.computed
    assert cost.flops(2, 8) == 4 * 2 * 8 * cost.exact
    assert cost.saved == pytest.approx(1 - cost.exact / cost.full)


def test_at_8k_all_but_half_a_percent_is_saved():
    """The paper's figure: 512 x 512 tokens, 512 of text, a radius of 8 to 16."""
    for radius in (8, 16):
        assert circle_cost(circle_layout((1, 512, 512), radius, 512, group=(1, 16, 16))).saved > 0.99


def test_the_cost_grows_with_the_number_of_tokens_and_not_with_its_square():
    small, large = (circle_cost(circle_layout((1, side, side), 4)) for side in (32, 64))
    assert large.exact / small.exact == pytest.approx(4, rel=0.15)
    assert large.full / small.full == 16
