"""Ends a command in order when it is asked to: SIGTERM and a closed terminal as Ctrl-C does, none with a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flexrun.cli.style import print_error
from flexrun.jobs.signals import STOPPING, leave_lost_terminal

INTERRUPTED = 130


def signals_interrupt():
    """While entered, SIGTERM and SIGHUP raise KeyboardInterrupt as SIGINT does: files are closed and locks let go."""

    def interrupt(number, frame):
        if number == signal.SIGHUP:
            leave_lost_terminal()
            signal.signal(number, signal.SIG_IGN)  # it comes more than once: what was begun here goes on to its end
        raise KeyboardInterrupt

    return _handled(interrupt, signal.SIGTERM, signal.SIGHUP)


def signals_end_at_once():
    """While entered, STOPPING signals end the process: for as long as libraries are imported, which swallow what is
    raised in their midst, and nothing is open yet."""

    def leave(number, frame):
        leave_lost_terminal()
        print_error("interrupted", "nothing was begun; run it again")
        sys.stderr.flush()
        os._exit(INTERRUPTED)

    return _handled(leave, *STOPPING)


@contextmanager
def _handled(handle: Callable, *numbers: signal.Signals) -> Iterator[None]:
    """Signals that are ignored stay so; outside the main thread nothing is changed."""
    is_main = threading.current_thread() is threading.main_thread()
    previous = {
        number: signal.signal(number, handle)
        for number in numbers
        if is_main and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
