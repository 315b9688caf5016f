"""Lanes: worker threads that run steps in order, and the progress counters that let them wait for each other.

A lane finishes its steps in order, so "the first n steps are done" is one number, and a dependency is a
(lane, order) pair compared with it. The compute lane has no thread: the caller runs its steps.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flexrun.core import Event, Lane
from flexrun.errors import ExecutionError, FlexrunError
from flexrun.steps import Step


class Progress:
    """How many steps each lane has finished; a failure in any lane wakes and fails every waiter."""

    def __init__(self):
        self._condition = threading.Condition()
        self._done = dict.fromkeys(Lane, 0)
        self.failure: BaseException | None = None

    def wait(self, step: Step) -> None:
        """Block until everything ``step`` depends on is finished. Raises ExecutionError where a lane failed."""
        done = self._done
        if self.failure is None and all(done[lane] > order for lane, order in step.depends_on):
            return
        with self._condition:
            self._condition.wait_for(
                lambda: self.failure is not None or all(done[lane] > order for lane, order in step.depends_on)
            )
        self.check()

    def finish(self, lane: Lane, count: int) -> None:
        """Lane ``lane`` has finished its first ``count`` steps."""
        with self._condition:
            self._done[lane] = count
            self._condition.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._condition:
            self.failure = self.failure or error
            self._condition.notify_all()

    def check(self) -> None:
        if self.failure is not None:
            if isinstance(self.failure, FlexrunError):
                raise self.failure
            raise ExecutionError(f"a lane failed: {self.failure!r}") from self.failure


@dataclass
class _Task:
    """A step split into parts that several threads of its lane may take."""

    step: Step
    parts: list[Callable[[], None]]
    next_part: int = 0
    unfinished: int = field(init=False)
    start_seconds: float = 0.0

    def __post_init__(self):
        self.unfinished = len(self.parts)


class LaneWorker:
    """Threads of one lane. Steps start in order; the parts of a step run on whichever threads are free."""

    def __init__(self, lane: Lane, progress: Progress, record: Callable[[Event], None] | None, threads: int = 1):
        self.lane = lane
        self._progress = progress
        self._record = record
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._current: _Task | None = None
        self._take_lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._finished_early: set[int] = set()
        self._done = 0
        self.busy_seconds = 0.0  # time in which at least one step was under way
        self._last_end_seconds = 0.0
        self.moved_bytes = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"flexrun-{lane.value}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, step: Step, parts: list[Callable[[], None]]) -> None:
        self._tasks.put(_Task(step, parts))

    def _take(self) -> tuple[_Task, Callable] | None:
        """The next part in order; waits for the dependencies of a step before its first part is handed out."""
        with self._take_lock:
            if self._current is None:
                task = self._tasks.get()
                if task is None:
                    self._tasks.put(None)  # for the other threads
                    return None
                self._progress.wait(task.step)
                task.start_seconds = time.perf_counter()
                self._current = task
            task = self._current
            part = task.parts[task.next_part]
            task.next_part += 1
            if task.next_part == len(task.parts):
                self._current = None
            return task, part

    def _run(self) -> None:
        try:
            while (taken := self._take()) is not None:
                task, part = taken
                part()
                self._finish_part(task)
        except BaseException as error:
            self._progress.fail(error)

    def _finish_part(self, task: _Task) -> None:
        with self._state_lock:
            task.unfinished -= 1
            if task.unfinished:
                return
            end_seconds = time.perf_counter()
            step = task.step
            self.busy_seconds += end_seconds - max(task.start_seconds, self._last_end_seconds)
            self._last_end_seconds = end_seconds
            self.moved_bytes += step.bytes
            self._finished_early.add(step.order)
            while self._done in self._finished_early:
                self._finished_early.discard(self._done)
                self._done += 1
            self._progress.finish(self.lane, self._done)
        if self._record is not None:
            self._record(event_of(step, task.start_seconds, end_seconds))

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Let queued work end (or stop at once after a failure) and join the threads."""
        self._tasks.put(None)
        for thread in self._threads:
            thread.join(timeout_seconds)


def event_of(step: Step, start_seconds: float, end_seconds: float) -> Event:
    return Event(
        step.kind.value, step.lane, start_seconds, end_seconds, step.pass_index, step.layer, step.bytes, step.flops
    )
