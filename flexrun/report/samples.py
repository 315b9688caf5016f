"""What a run did over time, in a few hundred points however long it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

MOST_POINTS = 400


@dataclass
class Point:
    """A stretch of a run that ends at ``end_seconds``: tokens run in it, and the busy seconds of each lane."""

    end_seconds: float
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished_requests: int = 0
    lane_seconds: dict[str, float] = field(default_factory=dict)


class Samples:
    """Adds up passes to points; once there are too many, neighbours become one and stretches twice as long."""

    def __init__(self, stretch_seconds: float = 0.1, clock=time.perf_counter):
        self._clock, self._stretch_seconds = clock, stretch_seconds
        self._start = clock()
        self._lanes_before: dict[str, float] = {}
        self.points: list[Point] = []
        self._open = Point(0.0)

    def add_pass(self, prompt_tokens: int, generated_tokens: int, lane_seconds: Mapping[str, float]) -> None:
        """A pass has ended. lane_seconds: busy seconds of each lane since the start."""
        point, now = self._open, self._clock() - self._start
        point.prompt_tokens += prompt_tokens
        point.generated_tokens += generated_tokens
        for lane, seconds in lane_seconds.items():
            gained = seconds - self._lanes_before.get(lane, 0.0)
            point.lane_seconds[lane] = point.lane_seconds.get(lane, 0.0) + gained
        self._lanes_before = dict(lane_seconds)
        point.end_seconds = now
        if now - self._last_end >= self._stretch_seconds:
            self._close()

    def add_request(self) -> None:
        """A request has been answered."""
        self._open.finished_requests += 1

    def finish(self) -> list[Point]:
        """All points, in order; what is open becomes one, or part of the last where only requests ended since."""
        if self._open.generated_tokens or self._open.prompt_tokens:
            self._close()
        elif self.points:
            self.points[-1].finished_requests += self._open.finished_requests
        return self.points

    @property
    def _last_end(self) -> float:
        return self.points[-1].end_seconds if self.points else 0.0

    def _close(self) -> None:
        self.points.append(self._open)
        self._open = Point(self._open.end_seconds)
        if len(self.points) > MOST_POINTS:
            last = self.points[-1:] if len(self.points) % 2 else []
            self.points = [_joined(*pair) for pair in zip(self.points[::2], self.points[1::2])] + last
            self._stretch_seconds *= 2


def _joined(first: Point, second: Point) -> Point:
    lanes = {
        lane: first.lane_seconds.get(lane, 0.0) + second.lane_seconds.get(lane, 0.0)
        for lane in {**first.lane_seconds, **second.lane_seconds}
    }
    return Point(
        second.end_seconds,
        first.prompt_tokens + second.prompt_tokens,
        first.generated_tokens + second.generated_tokens,
        first.finished_requests + second.finished_requests,
        lanes,
    )
