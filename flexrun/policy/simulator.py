"""Runs the executor's steps on a clock instead of a machine: the timeline a policy will have.

Each lane runs its steps in order once their dependencies are over, as in offload.lanes: weights in an order of their
own, and they stand still while the rows of a pass are on the same lane. Lanes that share a processor or memory slow
each other down: a step's speed is the product of what each other busy lane leaves it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from flexrun.core import Event, Lane
from flexrun.errors import ExecutionError
from flexrun.hardware import Hardware
from flexrun.placement import build_scheduler
from flexrun.policy.cost import StepCosts
from flexrun.policy.layout import Layout
from flexrun.steps import STREAMING, PassShape, Step

BESIDE_EMULATED_LINK = 0.25
STANDSTILL = 1e-9  # of its speed
LANES = list(Lane)
SHARED = (Lane.H2D, Lane.DISK_READ)  # lanes in which weights have a queue beside that of the rows
QUEUES = [*LANES, *SHARED]
ROWS_QUEUES = {lane: number for number, lane in enumerate(LANES)}
WEIGHTS_QUEUES = {lane: len(LANES) + number for number, lane in enumerate(SHARED)}


@dataclass
class Timeline:
    """A simulated run. pass_ends_seconds: when each pass was over. busy_seconds: of each lane, contention included."""

    pass_ends_seconds: list[float] = field(default_factory=list)
    busy_seconds: dict[Lane, float] = field(default_factory=lambda: dict.fromkeys(Lane, 0.0))
    events: list[Event] = field(default_factory=list)
    steps: int = 0

    @property
    def seconds(self) -> float:
        return self.pass_ends_seconds[-1] if self.pass_ends_seconds else 0.0

    @property
    def pass_seconds(self) -> list[float]:
        starts = [0.0, *self.pass_ends_seconds]
        return [end - start for start, end in zip(starts, self.pass_ends_seconds)]


def simulate_layout(
    layout: Layout, hardware: Hardware, passes: Iterable[PassShape], *, events: bool = False
) -> Timeline:
    """The timeline of ``passes`` under a layout; ``events``: record every step."""
    costs = StepCosts(layout.spec, layout.policy, layout.placement, hardware, on_device=layout.on_device)
    return _Clock(layout, costs, keep_events=events).run(passes)


class _Clock:
    """Queues as numbers, in the order of QUEUES: a search runs millions of steps through here."""

    def __init__(self, layout: Layout, costs: StepCosts, keep_events: bool):
        self._costs, self._keep_events = costs, keep_events
        self._scheduler = build_scheduler(
            layout.spec,
            layout.placement,
            layout.account,
            on_device=layout.on_device,
            policy=layout.policy,
        )
        self._compute = LANES.index(self._scheduler.compute_lane)
        self._names = _contention_names(costs, self._scheduler.compute_lane)
        self._speeds: dict[int, dict[int, float]] = {}
        self._waiting: list[deque[tuple[tuple, float, Step | None]]] = [deque() for _ in QUEUES]
        self._running: dict[int, list] = {}  # queue -> [seconds of work left, step, start, seconds it stood still]
        self._done = [0] * len(QUEUES)
        self._queued = [0] * len(QUEUES)  # steps so far
        self._beside = {ROWS_QUEUES[lane]: WEIGHTS_QUEUES[lane] for lane in SHARED}
        self._places: dict[Lane, list[tuple[int, int]]] = {lane: [] for lane in SHARED}  # by order in the lane
        self._now = 0.0
        self._timeline = Timeline()

    def run(self, passes: Iterable[PassShape]) -> Timeline:
        places, queues = self._places, ROWS_QUEUES
        for index, shape in enumerate(passes):
            shape = dataclasses.replace(shape, index=index)  # the scheduler counts passes from its first
            sequences = sum(micro_batch.decode_tokens for micro_batch in shape.micro_batches)
            between = self._costs.between_passes_seconds(sequences)
            self._waiting[self._compute].append(((), between, None))
            durations: dict[tuple, float] = {}
            steps = self._scheduler.pass_steps(shape)
            self._timeline.steps += len(steps)
            for step in steps:
                key = self._costs.alike(step)
                seconds = durations.get(key)
                if seconds is None:
                    durations[key] = seconds = self._costs.seconds_in_run(step, shape)
                depends_on = tuple(
                    [
                        places[lane][order] if lane in places else (queues[lane], order)
                        for lane, order in step.depends_on
                    ]
                )
                queue = queues[step.lane]
                if step.lane in places:
                    if step.kind in STREAMING:
                        queue = WEIGHTS_QUEUES[step.lane]
                    places[step.lane].append((queue, self._queued[queue]))
                    self._queued[queue] += 1
                self._waiting[queue].append((depends_on, seconds, step))
            self._run_pass()
            self._timeline.pass_ends_seconds.append(self._now)
        return self._timeline

    def _run_pass(self) -> None:
        """Advance until the compute lane has nothing left: the next pass is planned only then."""
        running, done, compute = self._running, self._done, self._compute
        waiting = list(enumerate(self._waiting))
        work_left = self._waiting[compute]
        while work_left or compute in running:
            for number, queue in waiting:
                if not queue or number in running:
                    continue
                for other, order in queue[0][0]:
                    if done[other] <= order:
                        break
                else:
                    _, seconds, step = queue.popleft()
                    running[number] = [seconds, step, self._now, 0.0]
            if not running:
                raise ExecutionError("the schedule cannot go on: every lane waits for another")
            self._advance()

    def _advance(self) -> None:
        """To the moment at which the next running step ends."""
        running = self._running
        if len(running) == 1:
            ((queue, entry),) = running.items()
            self._now += entry[0]
            self._finish(queue)
            return
        active = 0
        for queue in running:
            active |= 1 << queue
        speeds = self._speeds.get(active) or self._speeds_of(active)
        elapsed = min([entry[0] / speeds[queue] for queue, entry in running.items()])
        self._now += elapsed
        over = []
        for queue, entry in running.items():
            entry[0] -= elapsed * speeds[queue]
            if entry[0] <= 1e-12:
                over.append(queue)
        for queue in over:
            self._finish(queue)

    def _finish(self, queue: int) -> None:
        _, step, start_seconds, still_seconds = self._running.pop(queue)
        if step is None:
            return
        self._done[queue] += 1
        self._timeline.busy_seconds[step.lane] += self._now - start_seconds - still_seconds
        if queue in self._beside:
            beside = self._running.get(self._beside[queue])
            if beside is not None:
                beside[3] += self._now - max(start_seconds, beside[2])
        if self._keep_events:
            self._timeline.events.append(
                Event(
                    step.kind.value,
                    step.lane,
                    start_seconds,
                    self._now,
                    step.pass_index,
                    step.layer,
                    step.bytes,
                    step.flops,
                )
            )

    def _keeps(self, lane: str, other: str) -> float:
        costs = self._costs
        keeps = costs.hardware.keeps(lane, other)
        # An emulated link that is held to less than a copy's speed sleeps in between: it has time left to make up for
        # what slows its copies down, and takes a core for a part of its time only.
        copying = min(costs.h2d.bytes_per_second / costs.hardware.host_copy.bytes_per_second, 1.0)
        if lane == "host_copy":
            return min(keeps / copying, 1.0)
        if (lane, other) == ("compute", "host_copy") and keeps < 1:
            # An emulated link takes a core, and threads that compute wait for each other after every operation: with
            # the short operations of a run they stand still more than the profile's long ones.
            keeps = min(keeps, BESIDE_EMULATED_LINK)
        if other == "host_copy":
            return 1.0 - (1.0 - keeps) * copying
        return keeps

    def _speeds_of(self, active: int) -> dict[int, float]:
        """Of each queue in the set ``active`` (a bit a queue), the share of its speed that the others leave it."""
        hardware, names = self._costs.hardware, self._names
        busy = [queue for queue in range(len(QUEUES)) if active >> queue & 1]
        speeds = dict.fromkeys(busy, 1.0)
        moving = list(dict.fromkeys(QUEUES[queue] for queue in busy))
        for queue in busy:
            lane = QUEUES[queue]
            if queue >= len(LANES) and ROWS_QUEUES[lane] in speeds:
                speeds[queue] = STANDSTILL
                continue
            for other in moving:
                if other is lane:
                    continue
                speeds[queue] *= self._keeps(names[lane], names[other])
                if {names[lane], names[other]} == {"h2d", "d2h"}:
                    speeds[queue] *= hardware.duplex_share
        self._speeds[active] = speeds
        return speeds


def _contention_names(costs: StepCosts, compute_lane: Lane) -> dict[Lane, str]:
    """Under which name of hardware.LANES each lane's contention was measured."""
    emulated = costs.on_device and costs.hardware.gpu is None
    names = {lane: lane.value for lane in Lane}
    names[Lane.CPU] = "host_attention"
    if emulated:
        names[Lane.H2D] = names[Lane.D2H] = "host_copy"
    names[compute_lane] = "compute"
    return names
