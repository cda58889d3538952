"""The first and the last steps of a run, counted or as a share of it."""

import pytest

from smalti.core.errors import Refusal
from smalti.core.method import Moment
from smalti.seams.schedule import is_early, is_late


@pytest.mark.parametrize(("amount", "count"), [(0, 0), (3, 3), (0.25, 3), (0.3, 4), (1, 1), (12, 12)])
def test_steps_are_counted_or_a_share(amount, count):
    moments = [Moment(step, step, 0.0, steps=12) for step in range(12)]
    assert [is_early(one, amount) for one in moments] == [step < count for step in range(12)]
    assert sum(is_late(one, amount) for one in moments) == count


def test_what_needs_the_number_of_steps_asks_for_it():
    unknown = Moment(0, 0, 0.0)
    assert is_early(unknown, 2)
    assert not is_late(unknown, 0)
    for question in (lambda: is_early(unknown, 0.25), lambda: is_late(unknown, 1)):
        with pytest.raises(Refusal, match=r"handle.run\(steps=28\)"):
            question()
