"""Shows how far a job is: a bar on a terminal, a plain line every ten seconds in a log file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

PLAIN_SECONDS = 10.0
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} requests [{elapsed}{postfix}]"


class Progress:
    """Counts finished requests. Work, not requests, drives the ETA: the longest answers usually come first.

    total_requests, done: of the whole job, and done before this run. work: what this run is expected to take, in
    any unit. enabled: None draws a bar on a terminal and plain lines elsewhere; True forces the bar, False is silent.
    """

    def __init__(
        self,
        total_requests: int,
        work: float,
        *,
        done: int = 0,
        enabled: bool | None = None,
        stream: TextIO | None = None,
    ):
        self._stream = stream or sys.stderr
        self._total_requests, self._done_requests = total_requests, done
        self._work, self._done_work, self._finished_work = work, 0.0, 0.0
        self._generated_tokens = 0
        self._started = self._last_line = time.monotonic()
        draws = self._stream.isatty() if enabled is None else enabled
        self._plain = enabled is None and not draws
        # No colours are used, so NO_COLOR holds; ascii keeps the bar readable in any encoding.
        self._bar = tqdm(
            total=total_requests,
            initial=done,
            disable=not draws,
            file=self._stream,
            bar_format=_BAR,
            dynamic_ncols=True,
            ascii=None if (getattr(self._stream, "encoding", "") or "").lower().startswith("utf") else True,
            mininterval=0.2,
        )

    def advance(self, work: float, generated_tokens: int) -> None:
        """The engine has run a pass."""
        self._generated_tokens += generated_tokens
        self._done_work += work
        self._show(0)

    def finish(self, expected_work: float, work: float) -> None:
        """One request has finished, and took ``work`` in place of what was expected."""
        self._done_requests += 1
        self._finished_work += work
        self._work += work - expected_work
        self._show(1)

    def expect(self, work_left: float) -> None:
        """What has no answer yet is now expected to take ``work_left``, what of it is done included."""
        self._work = self._finished_work + work_left

    def _show(self, requests: int) -> None:
        if not self._bar.disable:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(requests)
        elif self._plain and time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            done = f"{self._done_requests:,}/{self._total_requests:,} requests"
            print(f"{done}, {self._rates()}", file=self._stream, flush=True)

    def close(self) -> None:
        self._bar.close()

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        left = max(self._work - self._done_work, 0.0)
        eta = tqdm.format_interval(seconds * left / self._done_work) if self._done_work else "?"
        return f"{self._generated_tokens / seconds:,.1f} generated tok/s, ETA {eta}"
