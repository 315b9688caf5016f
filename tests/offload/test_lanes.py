"""Lanes keep their order, wait for what a step depends on, and carry a failure to everyone who waits."""

from __future__ import annotations

import threading
import time
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun.core import Lane
from flexrun.errors import BudgetError, ExecutionError
from flexrun.offload import lanes
from flexrun.offload.lanes import BusyTime, LaneMeter, LaneWorker, Progress, Throttle
from flexrun.steps import Step, StepKind

WAIT_SECONDS = 20


def step(lane: Lane, order: int, *depends_on, nbytes: int = 0) -> Step:
    return Step(StepKind.READ_WEIGHTS, lane, order, 0, depends_on, bytes=nbytes)


def parts(*calls):
    """What a lane splits a step into."""
    return lambda step: list(calls)


def after(lane: Lane, order: int) -> Step:
    """A step that waits for the order-th step of a lane."""
    return step(Lane.GPU, 0, (lane, order))


@pytest.fixture
def progress():
    return Progress()


@pytest.fixture
def worker(progress):
    """worker(lane, threads=...) -> LaneWorker, stopped when the test ends."""
    made = []

    def make(lane: Lane, record=None, threads: int = 1, at_once_bytes: int | None = None) -> LaneWorker:
        made.append(LaneWorker(lane, progress, LaneMeter(record), threads, at_once_bytes=at_once_bytes))
        return made[-1]

    yield make
    progress.fail(ExecutionError("the test is over"))
    for lane_worker in made:
        lane_worker.close(WAIT_SECONDS)
        assert not any(thread.is_alive() for thread in lane_worker._threads)


def within(seconds: float, call, *arguments):
    """The call's outcome ("returned" or its error), on a thread of its own: a hang fails the test."""
    outcome = []

    def run() -> None:
        try:
            call(*arguments)
            outcome.append("returned")
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, "it hangs"
    return outcome[0]


def test_steps_run_in_order(progress, worker):
    lane, seen = worker(Lane.H2D), []
    for order in range(50):
        lane.submit(step(Lane.H2D, order), parts(partial(seen.append, order)))
    assert within(WAIT_SECONDS, progress.wait, after(Lane.H2D, 49)) == "returned"
    assert seen == list(range(50))


def test_a_step_waits_for_what_it_depends_on(progress, worker):
    read, copy, seen = worker(Lane.DISK_READ), worker(Lane.H2D), []
    gate = threading.Event()
    copy.submit(step(Lane.H2D, 0, (Lane.DISK_READ, 1), (Lane.GPU, 0)), parts(partial(seen.append, "copy")))
    read.submit(step(Lane.DISK_READ, 0), parts(partial(seen.append, "first")))
    read.submit(step(Lane.DISK_READ, 1), parts(gate.wait, partial(seen.append, "second")))
    time.sleep(0.02)
    assert seen == ["first"]
    gate.set()
    assert within(WAIT_SECONDS, progress.wait, after(Lane.DISK_READ, 1)) == "returned"
    time.sleep(0.02)
    assert seen == ["first", "second"], "the compute lane has not done its step yet"
    progress.finish(step(Lane.GPU, 0))
    assert within(WAIT_SECONDS, progress.wait, after(Lane.H2D, 0)) == "returned"
    assert seen == ["first", "second", "copy"]


def test_parts_of_a_step_run_on_several_threads(progress, worker):
    lane, together = worker(Lane.DISK_READ, threads=3), threading.Barrier(3)
    lane.submit(step(Lane.DISK_READ, 0), parts(*[partial(together.wait, WAIT_SECONDS)] * 3))
    assert within(WAIT_SECONDS, progress.wait, after(Lane.DISK_READ, 0)) == "returned"


def test_steps_under_way_together_have_no_more_bytes_than_they_may(progress, worker):
    lane, gate, under_way, most = worker(Lane.DISK_READ, threads=8, at_once_bytes=10), threading.Lock(), {}, []

    def part(order: int, nbytes: int) -> None:
        with gate:
            under_way[order] = nbytes
            most.append(sorted(under_way))
        time.sleep(0.01)
        with gate:
            under_way.pop(order, None)

    sizes = (7, 3, 3, 7, 25, 4, 4, 4)
    for order, nbytes in enumerate(sizes):
        lane.submit(step(Lane.DISK_READ, order, nbytes=nbytes), parts(*[partial(part, order, nbytes)] * 2))
    progress.wait(step(Lane.GPU, 0, *((Lane.DISK_READ, order) for order in range(len(sizes)))))
    assert [4] in most and not any(4 in orders and len(orders) > 1 for orders in most)  # it is larger: by itself
    assert any(len(orders) > 1 for orders in most)
    assert all(sum(sizes[order] for order in orders) <= 10 for orders in most if orders != [4])


def test_a_failure_wakes_a_step_that_waits_for_others_to_be_over(progress, worker):
    lane, begun = worker(Lane.DISK_READ, threads=2, at_once_bytes=10), threading.Event()

    def fail() -> None:
        begun.wait(WAIT_SECONDS)
        time.sleep(0.05)  # the other thread waits by now
        raise OSError("gone")

    lane.submit(step(Lane.DISK_READ, 0, nbytes=8), parts(fail))
    lane.submit(step(Lane.DISK_READ, 1, nbytes=8), lambda step: [begun.set() or (lambda: None)])
    assert isinstance(within(WAIT_SECONDS, progress.wait, after(Lane.DISK_READ, 1)), ExecutionError)
    for thread in lane._threads:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def test_a_step_is_done_when_all_its_parts_and_all_steps_before_it_are(progress, worker):
    lane, gate = worker(Lane.DISK_READ, threads=3), threading.Event()
    quick = threading.Event()
    lane.submit(step(Lane.DISK_READ, 0), parts(gate.wait, lambda: None))
    lane.submit(step(Lane.DISK_READ, 1), parts(quick.set))
    assert quick.wait(WAIT_SECONDS), "the next step starts while a part of the first is under way"
    time.sleep(0.02)
    assert progress._done[Lane.DISK_READ] == 0
    gate.set()
    assert within(WAIT_SECONDS, progress.wait, after(Lane.DISK_READ, 1)) == "returned"
    assert progress._done[Lane.DISK_READ] == 2


def test_events_and_totals_are_kept(progress, worker):
    events = []
    lane = worker(Lane.D2H, events.append)
    for order in range(3):
        lane.submit(step(Lane.D2H, order, nbytes=10), parts(partial(time.sleep, 0.005)))
    assert within(WAIT_SECONDS, progress.wait, after(Lane.D2H, 2)) == "returned"
    lane.close(WAIT_SECONDS)
    assert [event.bytes for event in events] == [10] * 3
    assert all(event.end_seconds - event.start_seconds >= 0.004 for event in events)
    assert all(first.end_seconds <= second.start_seconds for first, second in pairwise(events))
    assert lane._meter.moved_bytes == 30
    assert 0.012 <= lane._meter.busy_seconds < 5


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_wakes_every_waiter_with_the_original_error(progress, worker, threads):
    read, copy = worker(Lane.DISK_READ, threads=threads), worker(Lane.H2D)
    copied = []
    copy.submit(step(Lane.H2D, 0, (Lane.DISK_READ, 0)), parts(partial(copied.append, 1)))
    original = BudgetError("the disk is full", "buy another")

    def fail():
        time.sleep(0.05)
        raise original

    read.submit(step(Lane.DISK_READ, 0), parts(fail))
    assert within(WAIT_SECONDS, progress.wait, after(Lane.DISK_READ, 0)) is original
    assert within(WAIT_SECONDS, progress.wait, after(Lane.H2D, 0)) is original
    assert within(WAIT_SECONDS, progress.check) is original
    assert copied == []


def test_a_failure_of_another_kind_is_wrapped(progress, worker):
    worker(Lane.H2D).submit(step(Lane.H2D, 0), parts(partial(int, "no number")))
    error = within(WAIT_SECONDS, progress.wait, after(Lane.H2D, 0))
    assert isinstance(error, ExecutionError)
    assert "no number" in str(error)
    assert isinstance(error.__cause__, ValueError)


def test_the_first_failure_counts(progress):
    first = ExecutionError("first")
    progress.fail(first)
    progress.fail(ExecutionError("second"))
    assert within(WAIT_SECONDS, progress.check) is first


def test_closing_never_hangs(progress, worker):
    """Neither an idle lane, nor one that waits for a step that will never come, nor one after a failure."""
    idle, waiting, failed = worker(Lane.CPU, threads=4), worker(Lane.H2D), worker(Lane.D2H, threads=2)
    waiting.submit(step(Lane.H2D, 0, (Lane.GPU, 7)), parts(lambda: None))
    waiting.submit(step(Lane.H2D, 1), parts(lambda: None))
    progress.fail(ExecutionError("stop"))
    failed.submit(step(Lane.D2H, 0), parts(lambda: None))
    for lane in (idle, waiting, failed):
        assert within(WAIT_SECONDS, lane.close) == "returned"
        assert within(WAIT_SECONDS, lane.close) == "returned"
        assert not any(thread.is_alive() for thread in lane._threads)


def test_closing_lets_queued_work_end(progress, worker):
    lane, seen = worker(Lane.D2H), []
    for order in range(20):
        lane.submit(step(Lane.D2H, order), parts(partial(seen.append, order)))
    assert within(WAIT_SECONDS, lane.close) == "returned"
    assert seen == list(range(20))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20)), max_size=60))
def test_busy_time_is_how_long_any_span_lasted(spans):
    """Spans of whole seconds, in any order: as many seconds as lie in at least one."""
    busy, inside = BusyTime(), set()
    for start, length in spans:
        busy.add(float(start), float(start + length))
        inside |= set(range(start, start + length))
    assert busy.seconds == len(inside)


def test_busy_time_forgets_old_spans_but_not_their_seconds():
    busy = BusyTime()
    for second in range(3000):
        busy.add(second, second + 0.5)
    assert busy.seconds == pytest.approx(1500)
    assert len(busy._spans) <= BusyTime.LATEST
    busy.add(2990, 3000)
    assert busy.seconds == pytest.approx(1505)


def test_copies_that_follow_each_other_keep_to_the_bandwidth_and_a_rest_is_not_made_up_for(monkeypatch):
    now = 100.0
    monkeypatch.setattr(lanes, "time", SimpleNamespace(perf_counter=lambda: now))
    throttle = Throttle(1000.0)
    for copy in range(1, 11):
        arrival = throttle.take_turn(5.0)
        assert arrival == pytest.approx(100 + 0.005 * copy), "sleeps that end late add up to nothing"
        now = arrival + 0.0002
        throttle.arrived()
    now += 0.003
    assert throttle.take_turn(5.0) == pytest.approx(now + 0.005), "but the link rested"
    assert throttle.take_turn(5.0) == pytest.approx(now + 0.01), "two at once take turns"
    now += 1.0
    throttle.arrived()
    assert throttle.take_turn(5.0) == pytest.approx(now + 0.005), "nothing makes up for a whole second"
