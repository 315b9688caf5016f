"""Lanes: worker threads that run steps, and the progress that lets them wait for each other.

A dependency is a (lane, order) pair. A lane of the host has finished a step when its work is done. A lane that feeds a
queue of a GPU has finished it when it is enqueued, and leaves a mark behind it: another queue then waits for the mark
on the device, a host lane waits for it on the host. The compute lane has no thread: the caller runs its steps.
"""

from __future__ import annotations

import bisect
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from flexrun.core import Event, Lane
from flexrun.errors import ExecutionError, FlexrunError
from flexrun.offload.device import Mark, Queue
from flexrun.offload.failures import failure_of
from flexrun.steps import Step


class Progress:
    """Which steps are finished; a failure in any lane wakes and fails every waiter."""

    def __init__(self):
        self._condition = threading.Condition()
        self._done = dict.fromkeys(Lane, 0)  # the first so many steps of the lane are finished
        self._early: dict[Lane, set[int]] = {lane: set() for lane in Lane}  # finished before one that comes earlier
        self._marks: dict[Lane, dict[int, Mark]] = {lane: {} for lane in Lane}  # of steps a device may still be at
        self.failure: BaseException | None = None
        self._failed = threading.Event()

    def is_finished(self, lane: Lane, order: int) -> bool:
        return order < self._done[lane] or order in self._early[lane]

    def wait(self, step: Step, waiting: Queue | None = None) -> None:
        """Block until everything ``step`` depends on is finished; raises ExecutionError where a lane failed.

        waiting: the queue that the step will be put on. What a device has still to do is then waited for by that
        queue, and by the host only where there is none.
        """

        def ready() -> bool:
            return all(self.is_finished(lane, order) for lane, order in step.depends_on)

        if self.failure is not None or not ready():
            with self._condition:
                self._condition.wait_for(lambda: self.failure is not None or ready())
            self.check()
        for lane, order in step.depends_on:
            mark = self._marks[lane].get(order)
            if mark is None:
                continue
            if waiting is not None:
                waiting.wait(mark)
            else:
                mark.synchronize()

    def finish(self, step: Step, mark: Mark | None = None) -> None:
        """``step`` is done; with a mark, it is enqueued and done when the mark is reached."""
        with self._condition:
            lane, marks = step.lane, self._marks[step.lane]
            if mark is not None:  # before the count: whoever sees the step finished must find its mark
                while marks and (oldest := next(iter(marks))) is not None and marks[oldest].query():
                    del marks[oldest]
                marks[step.order] = mark
            early = self._early[lane]
            early.add(step.order)
            while self._done[lane] in early:
                early.discard(self._done[lane])
                self._done[lane] += 1
            self._condition.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._condition:
            self.failure = self.failure or error
            self._failed.set()
            self._condition.notify_all()

    def check(self) -> None:
        """Raise the failure of the run, if there is one."""
        if self.failure is not None:
            if isinstance(self.failure, FlexrunError):
                raise self.failure
            raise ExecutionError(f"the run was broken off: {self.failure!r}") from self.failure

    def sleep_until(self, seconds: float) -> None:
        """Sleep to a time of ``perf_counter``; a failure ends it."""
        remaining = seconds - time.perf_counter()
        if remaining > 0:
            self._failed.wait(remaining)


class Throttle:
    """Holds a lane to ``bytes_per_second``, however many threads it has: each copy gets its turn on the link."""

    AT_ONCE_SECONDS = 0.0005
    CATCH_UP_SECONDS = 0.005

    def __init__(self, bytes_per_second: float):
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_seconds = self._woke_seconds = 0.0

    def take_turn(self, nbytes: float) -> float:
        """The time (of ``perf_counter``) at which ``nbytes`` that set out now have arrived, at the earliest.

        A sleep ends late; whoever goes on at once after it starts when it should have ended.
        """
        with self._lock:
            now = time.perf_counter()
            goes_on = now - self._woke_seconds < self.AT_ONCE_SECONDS
            goes_on &= now - self._free_seconds < self.CATCH_UP_SECONDS
            start = self._free_seconds if goes_on else max(now, self._free_seconds)
            self._free_seconds = start + nbytes / self._bytes_per_second
            return self._free_seconds

    def arrived(self) -> None:
        """To be called when the sleep of a turn has ended."""
        self._woke_seconds = time.perf_counter()


class BusyTime:
    """How long at least one of many spans of time was under way. They may come in any order, but not very late."""

    LATEST = 256  # spans apart that a later one may still fill the gaps of

    def __init__(self):
        self._spans: list[tuple[float, float]] = []  # sorted, apart from each other
        self._settled_seconds = 0.0
        self._settled_until = float("-inf")

    def add(self, start: float, end: float) -> None:
        start = max(start, self._settled_until)
        if start >= end:
            return
        first = bisect.bisect_left(self._spans, start, key=lambda span: span[1])
        last = bisect.bisect_right(self._spans, end, key=lambda span: span[0])
        if first < last:
            start, end = min(start, self._spans[first][0]), max(end, self._spans[last - 1][1])
        self._spans[first:last] = [(start, end)]
        if len(self._spans) > self.LATEST:
            oldest = self._spans.pop(0)
            self._settled_seconds += oldest[1] - oldest[0]
            self._settled_until = oldest[1]

    @property
    def seconds(self) -> float:
        return self._settled_seconds + sum(end - start for start, end in self._spans)


class LaneMeter:
    """What one lane has done so far, on whichever threads and queues; hands every step to ``record`` as an event."""

    def __init__(self, record: Callable[[Event], None] | None = None):
        self._record = record
        self._lock = threading.Lock()
        self._busy = BusyTime()
        self.moved_bytes = 0
        self.flops = 0

    @property
    def busy_seconds(self) -> float:
        """Time in which at least one step was under way."""
        with self._lock:
            return self._busy.seconds

    def add(self, step: Step, start_seconds: float, end_seconds: float) -> None:
        with self._lock:
            self._busy.add(start_seconds, end_seconds)
            self.moved_bytes += step.bytes
            self.flops += step.flops
        if self._record is not None:
            self._record(event_of(step, start_seconds, end_seconds))


class QueuedSteps:
    """Steps on a queue whose times are read from their marks once the device has passed them."""

    def __init__(self, waiting: Queue, meter: LaneMeter):
        self._queue, self._meter = waiting, meter
        self._steps: deque[tuple[Step, Mark, Mark]] = deque()

    def add(self, step: Step, start: Mark, end: Mark) -> None:
        self._steps.append((step, start, end))
        while self._steps and self._steps[0][2].query():
            self._measure()

    def _measure(self) -> None:
        step, start, end = self._steps.popleft()
        self._meter.add(step, self._queue.seconds_of(start), self._queue.seconds_of(end))

    def drain(self) -> None:
        """Wait for the steps that are still under way."""
        while self._steps:
            self._steps[0][2].synchronize()
            self._measure()


@dataclass
class _Task:
    """A step, split into parts that several threads of its lane may take once its turn has come."""

    step: Step
    make_parts: Callable[[Step], list[Callable[[], None]]]
    settle: Callable[[Step], Step] | None = None
    parts: list[Callable[[], None]] = field(default_factory=list)
    next_part: int = 0
    unfinished: int = 0
    start_seconds: float = 0.0
    start: Mark | None = None

    def split(self) -> None:
        self.parts = self.make_parts(self.step)
        self.unfinished = len(self.parts)


class LaneWorker:
    """Threads that run steps of one lane. Steps start in order; their parts run on whichever threads are free.

    Several workers may serve one lane. feeds: the queue that the parts of a step put their work on (one thread then);
    the work of a step is over when its mark is reached or, with ``ends_on_host``, when its last part returns.
    at_once_bytes: of all steps under way together; one that is larger goes by itself. With more to do at once a disk is
    no faster, and some virtual ones tell of the first request only when they have done the last.
    """

    def __init__(
        self,
        lane: Lane,
        progress: Progress,
        meter: LaneMeter,
        threads: int = 1,
        *,
        throttle: Throttle | None = None,
        feeds: Queue | None = None,
        ends_on_host: bool = True,
        at_once_bytes: int | None = None,
    ):
        self.lane = lane
        self._progress, self._meter, self._throttle = progress, meter, throttle
        self._queue = feeds
        self._queued = QueuedSteps(feeds, meter) if feeds is not None and not ends_on_host else None
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._current: _Task | None = None
        self._taken: Step | None = None  # the last one
        self._take_lock = threading.Lock()
        self._at_once_bytes, self._under_way_bytes = at_once_bytes, 0
        self._state = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"flexrun-{lane.value}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        step: Step,
        make_parts: Callable[[Step], list[Callable[[], None]]],
        settle: Callable[[Step], Step] | None = None,
    ) -> None:
        """``make_parts`` is called by the lane, while the caller goes on: one part at least.

        settle: of a step that is known in full only when what it depends on is finished; the step as it is then.
        """
        self._tasks.put(_Task(step, make_parts, settle))

    def _take(self) -> tuple[_Task, Callable] | None:
        """The next part in order; waits for the dependencies of a step before its first part is handed out."""
        with self._take_lock:
            if self._current is None:
                task = self._tasks.get()
                if task is None:
                    self._tasks.put(None)  # for the other threads
                    return None
                self._taken = task.step
                if task.settle is None:
                    task.split()
                    self._progress.wait(task.step, self._queue)
                else:
                    self._progress.wait(task.step, self._queue)
                    task.step = task.settle(task.step)
                    task.split()
                self._begin(task.step)
                task.start_seconds = time.perf_counter()
                if self._queue is not None:
                    task.start = self._queue.mark()
                self._current = task
            task = self._current
            part = task.parts[task.next_part]
            task.next_part += 1
            if task.next_part == len(task.parts):
                self._current = None
            return task, part

    def _begin(self, step: Step) -> None:
        """Wait until what is under way leaves room for the step."""
        with self._state:
            if self._at_once_bytes is not None:
                self._state.wait_for(
                    lambda: (
                        not self._under_way_bytes
                        or self._under_way_bytes + step.bytes <= self._at_once_bytes
                        or self._progress.failure is not None
                    )
                )
                self._progress.check()
            self._under_way_bytes += step.bytes

    def _run(self) -> None:
        step = None  # whose part is being run
        try:
            with nullcontext() if self._queue is None else self._queue.active():
                while (taken := self._take()) is not None:
                    task, part = taken
                    step = task.step
                    self._run_part(task, part)
                    if self._queue is not None:
                        self._queue.bound()
                    self._finish_part(task)
                    step = None
                if self._queued is not None:
                    self._queued.drain()
        except BaseException as error:
            self._progress.fail(failure_of(error, step or self._taken))
            with self._state:
                self._state.notify_all()

    def _run_part(self, task: _Task, part: Callable[[], None]) -> None:
        if self._throttle is None:
            part()
            return
        arrival_seconds = self._throttle.take_turn(task.step.bytes / len(task.parts))
        part()
        self._progress.sleep_until(arrival_seconds)
        self._throttle.arrived()

    def _finish_part(self, task: _Task) -> None:
        with self._state:
            task.unfinished -= 1
            # whole numbers, so that nothing is left of a step when its last part is over
            self._under_way_bytes -= task.step.bytes // len(task.parts)
            if not task.unfinished:
                self._under_way_bytes -= task.step.bytes % len(task.parts)
            self._state.notify()  # at most one waits: whoever takes the next step
            if task.unfinished:
                return
        step = task.step
        if self._queued is not None:
            end = self._queue.mark()
            self._progress.finish(step, end)
            self._queued.add(step, task.start, end)
            return
        end_seconds = time.perf_counter()
        if task.start is not None:  # the device may have kept the step waiting; the host saw it end
            task.start_seconds = min(self._queue.seconds_of(task.start), end_seconds)
        self._meter.add(step, task.start_seconds, end_seconds)
        self._progress.finish(step)

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Let queued work end (or stop at once after a failure) and join the threads."""
        self._tasks.put(None)
        for thread in self._threads:
            thread.join(timeout_seconds)


def event_of(step: Step, start_seconds: float, end_seconds: float) -> Event:
    return Event(
        step.kind.value, step.lane, start_seconds, end_seconds, step.pass_index, step.layer, step.bytes, step.flops
    )
