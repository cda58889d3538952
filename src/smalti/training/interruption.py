"""Requests to stop that arrive from outside: signals and the end of a time budget."""

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Remembers the first SIGTERM or SIGINT while its block runs; a second one acts as it would have without us.

    Args:
        minutes: wall-clock budget from now, or None.
    """

    def __init__(self, minutes: float | None = None):
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._before: dict[int, Any] = {}
        self.signal: int | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    @property
    def is_late(self) -> bool:
        """Whether the time budget is spent."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set outside of Python
        self._before = {}
