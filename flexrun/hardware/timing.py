"""How one reading is taken: repeats, and from them a figure that neighbours on the machine disturb least."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

Stopwatch = Callable[[Callable[[], object]], float]  # runs a call and tells the seconds it took


@dataclass(frozen=True)
class Reading:
    """seconds: of one call. spread: of its repeats, interquartile range over median."""

    seconds: float
    spread: float = 0.0


def wall_clock(call: Callable[[], object]) -> float:
    start_seconds = time.perf_counter()
    call()
    return time.perf_counter() - start_seconds


def read(
    call: Callable[[], object],
    budget_seconds: float,
    *,
    stopwatch: Stopwatch = wall_clock,
    warm_up: int = 1,
    least: int = 4,
    most: int = 64,
) -> Reading:
    """Repeat ``call`` for about ``budget_seconds``, at least ``least`` times; the first ``warm_up`` do not count."""
    for _ in range(warm_up):
        call()
    seconds: list[float] = []
    until = time.perf_counter() + budget_seconds
    while len(seconds) < least or (len(seconds) < most and time.perf_counter() < until):
        seconds.append(stopwatch(call))
    return reading_of(seconds)


def reading_of(seconds: Sequence[float]) -> Reading:
    """Mean of the fastest quarter: other programs only ever make a repeat slower."""
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / median(ordered)
    return Reading(fmean(ordered[: max(quarter, 1)]), spread)
