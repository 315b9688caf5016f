"""A run over time in few points: nothing is lost when neighbours are joined."""

from __future__ import annotations

import pytest

from flexrun.report.samples import MOST_POINTS, Samples


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize("passes", [0, 1, 7, 399, 400, 401, 403, 5000])
def test_sums_survive_however_long_the_run(passes):
    clock = Clock()
    samples = Samples(stretch_seconds=0.5, clock=clock)
    busy = 0.0
    for number in range(passes):
        clock.seconds += 1.0
        busy += 0.25
        samples.add_pass(number, 2, {"cpu": busy, "disk_read": 2 * busy})
        samples.add_request()
    points = samples.finish()
    assert len(points) <= MOST_POINTS + 1
    assert sum(point.prompt_tokens for point in points) == sum(range(passes))
    assert sum(point.generated_tokens for point in points) == 2 * passes
    assert sum(point.finished_requests for point in points) == passes
    assert sum(point.lane_seconds["cpu"] for point in points) == pytest.approx(busy)
    assert sum(point.lane_seconds["disk_read"] for point in points) == pytest.approx(2 * busy)
    ends = [point.end_seconds for point in points]
    assert ends == sorted(ends) and len(set(ends)) >= len(ends) - 1
    if passes:
        assert ends[-1] == passes


def test_passes_of_one_stretch_are_one_point():
    clock = Clock()
    samples = Samples(stretch_seconds=1.0, clock=clock)
    for _ in range(100):
        clock.seconds += 0.1
        samples.add_pass(0, 1, {})
    assert 9 <= len(samples.finish()) <= 11
