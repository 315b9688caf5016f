"""Turns Ctrl-C into an orderly end: the first asks the job to stop, the second stops it where it is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


class StopSignals:
    """While entered, SIGINT and SIGTERM set ``requested`` and call ``on_first``; another one raises KeyboardInterrupt.

    Signals reach only the main thread; entered from any other this does nothing.
    """

    def __init__(self, on_first: Callable[[], None]):
        self.requested = False
        self._on_first = on_first
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._on_first()
