"""Files that a run leaves beside its answers: one that cannot be written is refused before the run, and after it only
told, for the answers are there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy

from flexrun.core import Event
from flexrun.errors import ConfigError
from flexrun.moe import write_expert_profile
from flexrun.report.trace import write_chrome_trace


def check_side_file(path: str | Path | None) -> None:
    """Raises ConfigError where it is plain that the file could not be written."""
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {folder}", f"make it: mkdir -p {folder}")
    if Path(path).is_dir() or not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written", "name a file that can be")


class SideFiles:
    """trace: path of the timeline, expert_profile: of what each expert got; None where they are not wanted.

    Raises ConfigError as ``check_side_file``.
    """

    def __init__(self, trace: str | Path | None, expert_profile: str | Path | None):
        self.trace, self.expert_profile = trace, expert_profile
        check_side_file(trace)
        check_side_file(expert_profile)

    def write(self, events: Iterable[Event], expert_counts: numpy.ndarray | None, say: Callable[[str], None]) -> None:
        """events, expert_counts: of the whole run; nothing is written of what there is none of."""
        if self.trace is not None and events:
            _write(self.trace, partial(write_chrome_trace, events), say)
        if expert_counts is not None:
            _write(self.expert_profile, lambda path: write_expert_profile(path, expert_counts), say)


def _write(path: str | Path, write: Callable[[str | Path], None], say: Callable[[str], None]) -> None:
    try:
        write(path)
    except OSError as error:
        say(f"warning: {path} cannot be written: {error.strerror}")
