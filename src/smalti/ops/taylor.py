"""Forecasts of a tensor from the values it had: a Taylor series whose derivatives are finite differences.

At every known value F at place s, with d = s - (the place before), the factors are renewed from the lowest:

    D0 = F,   D(i+1) = (Di - Di of before) / d,

and the forecast at s + x is the sum of x^i / i! * Di. All orders share the newest distance d. With `is_divided` they
are Newton's divided differences over the places themselves, exact for polynomials on irregular places. What is kept are
plain differences, each with a scale that makes it a factor: dividing them would cost a pass over memory more.

Source: TaylorSeer (arXiv 2503.06923), equations 6 to 8; Newton's form as in any text on interpolation.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TaylorState:
    """Factors of one tensor.

    Args:
        order: O, the highest derivative; 0 repeats the last value.
        is_divided: Newton's divided differences in place of the published form.
        store: dtype in which differences are kept; None = that of the tensor.
        is_offloaded: whether they wait in the CPU's memory.
        differences: D0 to DO over their scales, as far as they are known.
        scales: Di = scales[i] * differences[i].
        places: where the newest values were taken, newest first.
        dtype: of the tensor.
        device: of the tensor.
    """

    order: int
    is_divided: bool = False
    store: torch.dtype | None = None
    is_offloaded: bool = False
    differences: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    places: list[float] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def update(state: TaylorState, value: Tensor, place: float, is_derived: bool = True) -> None:
    """Takes in a value; it is copied, so that later changes in place do not reach the series.

    Args:
        state: changed in place.
        value: F, any shape, the same at every call.
        place: s, different from the one before.
        is_derived: whether derivatives are renewed; otherwise only the value is kept.
    """
    state.dtype, state.device = value.dtype, value.device
    old = state.differences if is_derived else []
    # The memory of the old differences takes the new ones: each that of the one below it, the highest's the value.
    is_reused = len(old) == state.order + 1 and not state.is_offloaded
    known = value.detach()
    differences = [old[-1].copy_(known) if is_reused else known.to(state.store or value.dtype, copy=True)]
    scales = [1.0]
    for i, before in enumerate(_fetched(state, one) for one in old[: state.order]):
        differences.append(torch.sub(differences[i], before, alpha=state.scales[i] / scales[i], out=before))
        scales.append(scales[i] / (place - state.places[i if state.is_divided else 0]))
    state.differences = [one.to("cpu") if state.is_offloaded else one for one in differences]
    state.scales, state.places = scales, [place, *state.places][: state.order + 1]


def predict(state: TaylorState, place: float) -> Tensor:
    """The forecast at a place: a new tensor in the shape, dtype and on the device of the values.

    Raises:
        ValueError: no value was taken in yet.
    """
    if not state.differences:
        raise ValueError("a forecast needs at least one value; call update first")
    result = _fetched(state, state.differences[0])
    weight = 1.0
    for i, difference in enumerate(state.differences[1:], start=1):
        weight *= place - state.places[i - 1] if state.is_divided else (place - state.places[0]) / i
        # One pass over memory a difference, and none to copy the first: forecasts of small models cost little else.
        add = torch.add if i == 1 else torch.Tensor.add_
        result = add(result, _fetched(state, difference), alpha=weight * state.scales[i])
    result = result.to(state.dtype)
    return result.clone() if result is state.differences[0] else result


def kept_bytes(state: TaylorState) -> int:
    """Memory of the differences."""
    return sum(one.nbytes for one in state.differences)


def _fetched(state: TaylorState, difference: Tensor) -> Tensor:
    return difference.to(state.device, non_blocking=True) if state.is_offloaded else difference
