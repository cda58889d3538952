"""Work is done once a piece, here or by workers that may be killed."""

import os
import signal
import time

import pytest

from smalti.core.cluster import run_all
from smalti.core.errors import UserError


def squares():
    return lambda number: number**2


def test_here_results_come_in_order_and_preparing_happens_once():
    prepared = []

    def prepare():
        prepared.append(1)
        return lambda number: number**2

    assert list(run_all(prepare, [3, 1, 2])) == [(0, 9), (1, 1), (2, 4)]
    assert prepared == [1]
    assert list(run_all(prepare, [])) == []
    assert prepared == [1]


@pytest.mark.parametrize(("words", "reason"), [({"cluster": "rays"}, "ray"), ({"workers": 0}, "at least 1")])
def test_what_cannot_be_is_refused(words, reason):
    with pytest.raises(UserError, match=reason):
        list(run_all(squares, [1], **words))


def test_on_ray_a_killed_workers_piece_is_done_again_and_mistakes_come_back(tmp_path):
    pytest.importorskip("ray")
    places = str(tmp_path)

    def prepare():
        def work(number):
            first = f"{places}/{number}"
            if number == 2 and not os.path.exists(first):
                open(first, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 99:
                raise UserError("99 is too much")
            time.sleep(0.05)
            return number**2

        return work

    assert sorted(run_all(prepare, [0, 1, 2, 3, 4], "ray", 2)) == [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16)]
    assert (tmp_path / "2").exists()
    with pytest.raises(UserError, match=r"^99 is too much$"):
        list(run_all(prepare, [99], "ray", 1))
