import pytest
import torch

from smalti.ops.taylor import TaylorState, kept_bytes, predict, update


def after(function, places, order, **settings):
    state = TaylorState(order, **settings)
    for place in places:
        update(state, function(torch.tensor(float(place), dtype=torch.float64)), place)
    return state


@pytest.mark.parametrize("order", [0, 1])
def test_the_published_form_is_exact_for_polynomials_up_to_degree_one(order):
    state = after(lambda s: 3 + 2 * s * (order > 0), [0, 4, 8], order)
    assert predict(state, 11.0) == pytest.approx(3 + 22 * (order > 0))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_divided_differences_are_exact_up_to_their_order_on_irregular_places(order):
    def polynomial(s):
        return sum((-1) ** i * (s / 5) ** i for i in range(order + 1))

    state = after(polynomial, [0, 1, 2, 6, 9], order, is_divided=True)
    assert predict(state, 11.0).item() == pytest.approx(polynomial(torch.tensor(11.0)).item(), rel=1e-6)


def test_the_published_form_follows_its_equations():
    """All orders share the newest distance: D1 = (F - F')/d, D2 = (D1 - D1')/d."""
    values = {0: 1.0, 1: 2.0, 4: 8.0}
    state = after(lambda s: torch.tensor(values[int(s)]), [0, 1, 4], 2)
    first, before = (8 - 2) / 3, (2 - 1) / 1
    second = (first - before) / 3
    factors = [scale * one.item() for scale, one in zip(state.scales, state.differences, strict=True)]
    assert factors == pytest.approx([8, first, second])
    assert predict(state, 6.0).item() == pytest.approx(8 + 2 * first + 2 * second)


def test_orders_grow_one_by_one_and_can_be_held_back():
    state = TaylorState(2)
    for place, known in ((0, 1), (1, 2), (2, 3), (3, 3)):
        update(state, torch.randn(2), place)
        assert len(state.differences) == known
    update(state, torch.ones(2), 4, is_derived=False)
    assert torch.equal(predict(state, 9.0), torch.ones(2))


def test_neither_values_nor_forecasts_share_memory_with_the_series():
    value = torch.ones(3)
    state = TaylorState(0)
    update(state, value, 0)
    value += 1
    forecast = predict(state, 1)
    forecast += 1
    assert torch.equal(predict(state, 1), torch.ones(3))


@pytest.mark.parametrize(("store", "size"), [(None, 2), (torch.bfloat16, 2), (torch.float32, 4)])
def test_differences_are_kept_as_asked_and_forecasts_have_the_values_dtype(store, size):
    state = TaylorState(1, store=store, is_offloaded=True)
    for place in (0, 1):
        update(state, torch.randn(5).half(), place)
    assert kept_bytes(state) == 2 * 5 * size
    assert predict(state, 2).dtype == torch.float16


def test_nothing_to_forecast_from_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        predict(TaylorState(1), 1.0)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_differences_are_renewed_in_place_and_forecasts_are_their_own(order):
    values = [torch.randn(3, 4) for _ in range(6)]
    state, fresh = TaylorState(order), TaylorState(order, is_offloaded=True)
    forecasts, memory = [], None
    for place, value in enumerate(values):
        given = value.clone()
        update(state, given, float(place))
        given.zero_()
        update(fresh, value, float(place))
        assert all(torch.equal(one, other) for one, other in zip(state.differences, fresh.differences, strict=True))
        forecasts.append((predict(state, place + 0.5), predict(fresh, place + 0.5)))
        if place > order:
            assert memory is None or {one.data_ptr() for one in state.differences} == memory
            memory = {one.data_ptr() for one in state.differences}
    assert all(torch.equal(one, other) for one, other in forecasts)
    assert memory is not None
    assert not memory & {one.data_ptr() for one, _ in forecasts}
