"""Ends a command in order when it is asked to: SIGTERM as Ctrl-C does, and neither with the traceback of an import."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flexrun.cli.style import print_error

INTERRUPTED = 130


def sigterm_interrupts():
    """While entered, SIGTERM raises KeyboardInterrupt, so that files are closed and locks let go."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    return _handled(interrupt, signal.SIGTERM)


def signals_end_at_once():
    """While entered, SIGINT and SIGTERM end the process: for as long as libraries are imported, which swallow what is
    raised in their midst, and nothing is open yet."""

    def leave(number, frame):
        print_error("interrupted", "nothing was begun; run it again")
        sys.stderr.flush()
        os._exit(INTERRUPTED)

    return _handled(leave, signal.SIGINT, signal.SIGTERM)


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
