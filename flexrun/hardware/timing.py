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


def read_all(
    calls: Sequence[Callable[[], object]],
    budget_seconds: float,
    *,
    stopwatch: Stopwatch = wall_clock,
    warm_up: int = 1,
    least: int = 4,
    most: int = 64,
    rounds: int = 2,
    typical: bool = False,
) -> list[Reading]:
    """Repeat each call for about ``budget_seconds``, ``least`` to ``most`` times; the first ``warm_up`` do not count.

    All calls take their turn in each of the rounds, so that a burst of other work spoils no call's every repeat.
    typical: see reading_of.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        for call, taken in zip(calls, seconds):
            for _ in range(0 if number else warm_up):
                call()
            before, until = len(taken), time.perf_counter() + budget_seconds / rounds
            while (count := len(taken) - before) * rounds < least or (
                count * rounds < most and time.perf_counter() < until
            ):
                taken.append(stopwatch(call))
    return [reading_of(taken, typical) for taken in seconds]


def reading_of(seconds: Sequence[float], typical: bool = False) -> Reading:
    """Mean of the fastest quarter: other programs only ever make a repeat slower. typical: the median, where repeats
    differ by themselves, as reads from one place of a disk and from another do."""
    ordered = sorted(seconds)
    quarter, middle = len(ordered) // 4, median(ordered)
    spread = (ordered[-1 - quarter] - ordered[quarter]) / middle
    return Reading(middle if typical else fmean(ordered[: max(quarter, 1)]), spread)
