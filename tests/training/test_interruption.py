import os
import signal
import threading

import pytest

from smalti.training.interruption import Interruption


def test_the_first_signal_is_remembered_and_the_second_acts():
    with Interruption() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_time_budget():
    assert not Interruption().is_late
    assert not Interruption(1.0).is_late
    assert Interruption(1e-9).is_late


def test_in_another_thread_signals_are_left_alone():
    seen = []

    def work():
        with Interruption() as stop:
            seen.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
