"""Readings keep to their budget, and other programs that disturb some repeats do not show in them."""

import pytest

from flexrun.hardware.timing import read_all, reading_of, wall_clock


def test_a_reading_is_the_quiet_quarter():
    quiet = [1.0, 1.1] * 8
    assert reading_of(quiet).seconds == pytest.approx(1.0) and reading_of(quiet).spread == pytest.approx(0.1 / 1.05)
    disturbed = reading_of([*quiet[:8], *([9.0] * 8)])
    assert disturbed.seconds == pytest.approx(1.0) and disturbed.spread > 1
    assert reading_of([2.0]).seconds == 2.0


def test_every_call_has_its_turn_in_every_round():
    order = []
    calls = [lambda name=name: order.append(name) for name in "ab"]
    readings = read_all(calls, 0.0, stopwatch=lambda call: call() or 0.5, warm_up=2, least=4)
    assert "".join(order) == "aaaa" + "bbbb" + "aa" + "bb"  # two to warm up, then two in each of two rounds
    assert [reading.seconds for reading in readings] == [0.5, 0.5]


def test_there_is_an_end_to_the_repeats():
    calls = []
    read_all([lambda: calls.append(1)], 60.0, warm_up=0, most=9)
    assert len(calls) == 10  # two rounds of five


def test_wall_clock():
    assert wall_clock(lambda: sum(range(100_000))) > 0


def test_where_repeats_differ_by_themselves_the_middle_one_is_taken():
    seconds = [4.0, 1.0, 2.0, 9.0, 3.0]
    assert reading_of(seconds).seconds == 1.0
    assert reading_of(seconds, typical=True).seconds == 3.0
    calls, taken = [lambda: None, lambda: None], iter(range(1, 100))
    readings = read_all(calls, 0.0, stopwatch=lambda call: next(taken), rounds=1, least=3, typical=True)
    assert [reading.seconds for reading in readings] == [2, 5]
