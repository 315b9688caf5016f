"""Gathers what the page of a job's report shows, while the job runs: see report/page.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexrun.errors import ConfigError
from flexrun.jobs.index import LineError
from flexrun.report.page import report_page
from flexrun.report.samples import Samples

ERRORS_SHOWN = 50
PAGE_FILE, TRACE_FILE = "index.html", "trace.json"


class JobReport:
    """The report of one job in ``folder``, which is made.

    Nothing is gathered and nothing written where folder is None. What an earlier job left there stays until this one
    begins, so that a command that is refused costs no page. The trace beside the page is the engine's to write.
    Raises ConfigError where the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None):
        self._folder = None if folder is None else Path(folder)
        self._samples: Samples | None = None
        self._errors: list[LineError] = []
        self._begun = False
        if self._folder is None:
            return
        try:
            os.makedirs(self._folder, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError(f"the report {self._folder} cannot be made: {error.strerror}", "name another folder")

    def begin(self) -> None:
        """The job is known to be one that can go on. Raises ConfigError where an earlier report cannot be removed."""
        if self._folder is None:
            return
        try:
            for name in (PAGE_FILE, TRACE_FILE):
                (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._refused(error) from error
        self._begun = True

    def start(self) -> None:
        """The engine begins to run."""
        if self._folder is not None:
            self._samples = Samples()

    def add_pass(
        self, prompt_tokens: int, generated_tokens: int, lane_seconds: Callable[[], Mapping[str, float]]
    ) -> None:
        """lane_seconds: gives the busy seconds of each lane so far."""
        if self._samples is not None:
            self._samples.add_pass(prompt_tokens, generated_tokens, lane_seconds())

    def add_request(self) -> None:
        if self._samples is not None:
            self._samples.add_request()

    def add_error(self, error: LineError) -> None:
        if self._folder is not None and len(self._errors) < ERRORS_SHOWN:
            self._errors.append(error)

    def write(self, summary: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Write the page of a job that has begun. Where that fails it is only said: the answers are safe, and a page
        is no reason to fail."""
        if not self._begun:
            return
        trace = TRACE_FILE if (self._folder / TRACE_FILE).exists() else None
        points = [] if self._samples is None else self._samples.finish()
        errors = [(error.line, error.code, error.message) for error in self._errors]
        try:
            (self._folder / PAGE_FILE).write_text(report_page(summary, points, errors, trace), encoding="utf-8")
        except OSError as error:
            say(f"warning: the report {self._folder / PAGE_FILE} cannot be written: {error.strerror}")
