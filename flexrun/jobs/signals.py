"""Turns Ctrl-C into an orderly end: the first asks the job to stop, the second stops it where it is."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """While entered, STOPPING signals set ``requested`` and call ``on_first``; another one raises KeyboardInterrupt.

    Not another SIGHUP: a terminal that is closed sends it more than once. Signals that are ignored (nohup) stay so.
    Signals reach only the main thread; entered from any other this does nothing.
    """

    def __init__(self, on_first: Callable[[], None]):
        self.requested = False
        self._on_first = on_first
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if number == signal.SIGHUP:
            leave_lost_terminal()
        if not self.requested:
            self.requested = True
            self._on_first()
        elif number != signal.SIGHUP:
            raise KeyboardInterrupt


def leave_lost_terminal() -> None:
    """Send stdout and stderr nowhere, where they are of a terminal that was closed: writing there is an error."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
