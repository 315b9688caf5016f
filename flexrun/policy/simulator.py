"""Runs the executor's steps on a clock instead of a machine: the timeline a policy will have.

Each lane runs its steps in order once their dependencies are over, as in offload.lanes. Lanes that share a
processor or memory slow each other down: a step's speed is the product of what each other busy lane leaves it.
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
from flexrun.steps import PassShape, Step

BESIDE_EMULATED_LINK = 0.25
LANES = list(Lane)
LANE_NUMBERS = {lane: number for number, lane in enumerate(LANES)}


@dataclass
class Timeline:
    """A simulated run. pass_ends_seconds: when each pass was over. busy_seconds: of each lane, contention included."""

    pass_ends_seconds: list[float] = field(default_factory=list)
    busy_seconds: dict[Lane, float] = field(default_factory=lambda: dict.fromkeys(Lane, 0.0))
    events: list[Event] = field(default_factory=list)

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
    """Lanes as numbers, in the order of Lane: a search runs millions of steps through here."""

    def __init__(self, layout: Layout, costs: StepCosts, keep_events: bool):
        self._costs, self._keep_events = costs, keep_events
        self._scheduler = build_scheduler(
            layout.spec,
            layout.placement,
            layout.account,
            on_device=layout.on_device,
            half_batches=layout.policy.half_batches,
        )
        self._compute = LANES.index(self._scheduler.compute_lane)
        self._names = _contention_names(costs, self._scheduler.compute_lane)
        self._speeds: dict[int, dict[int, float]] = {}
        self._waiting: list[deque[tuple[tuple, float, Step | None]]] = [deque() for _ in LANES]
        self._running: dict[int, list] = {}  # lane -> [seconds of work left, step, start]
        self._done = [0] * len(LANES)
        self._now = 0.0
        self._timeline = Timeline()

    def run(self, passes: Iterable[PassShape]) -> Timeline:
        for index, shape in enumerate(passes):
            shape = dataclasses.replace(shape, index=index)  # the scheduler counts passes from its first
            sequences = sum(micro_batch.decode_tokens for micro_batch in shape.micro_batches)
            between = self._costs.between_passes_seconds(sequences)
            self._waiting[self._compute].append(((), between, None))
            durations: dict[tuple, float] = {}
            for step in self._scheduler.pass_steps(shape):
                key = self._costs.alike(step)
                seconds = durations.get(key)
                if seconds is None:
                    durations[key] = seconds = self._costs.seconds_in_run(step, shape)
                depends_on = tuple((LANE_NUMBERS[lane], order) for lane, order in step.depends_on)
                self._waiting[LANE_NUMBERS[step.lane]].append((depends_on, seconds, step))
            self._run_pass()
            self._timeline.pass_ends_seconds.append(self._now)
        return self._timeline

    def _run_pass(self) -> None:
        """Advance until the compute lane has nothing left: the next pass is planned only then."""
        running, done, compute = self._running, self._done, self._compute
        lanes = list(enumerate(self._waiting))
        work_left = self._waiting[compute]
        while work_left or compute in running:
            for lane, queue in lanes:
                if not queue or lane in running:
                    continue
                for other, order in queue[0][0]:
                    if done[other] <= order:
                        break
                else:
                    _, seconds, step = queue.popleft()
                    running[lane] = [seconds, step, self._now]
            if not running:
                raise ExecutionError("the schedule cannot go on: every lane waits for another")
            self._advance()

    def _advance(self) -> None:
        """To the moment at which the next running step ends."""
        running = self._running
        if len(running) == 1:
            ((lane, entry),) = running.items()
            self._now += entry[0]
            self._finish(lane)
            return
        active = 0
        for lane in running:
            active |= 1 << lane
        speeds = self._speeds.get(active) or self._speeds_of(active)
        elapsed = min([entry[0] / speeds[lane] for lane, entry in running.items()])
        self._now += elapsed
        over = []
        for lane, entry in running.items():
            entry[0] -= elapsed * speeds[lane]
            if entry[0] <= 1e-12:
                over.append(lane)
        for lane in over:
            self._finish(lane)

    def _finish(self, lane: int) -> None:
        _, step, start_seconds = self._running.pop(lane)
        if step is None:
            return
        self._done[lane] += 1
        self._timeline.busy_seconds[LANES[lane]] += self._now - start_seconds
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
        keeps = self._costs.hardware.keeps(lane, other)
        if (lane, other) == ("compute", "host_copy") and keeps < 1:
            # An emulated link takes a core, and threads that compute wait for each other after every operation: with
            # the short operations of a run they stand still more than the profile's long ones.
            return min(keeps, BESIDE_EMULATED_LINK)
        return keeps

    def _speeds_of(self, active: int) -> dict[int, float]:
        """Of each lane in the set ``active`` (a bit a lane), the share of its speed that the others leave it."""
        hardware, names = self._costs.hardware, self._names
        busy = [lane for lane in range(len(LANES)) if active >> lane & 1]
        speeds = dict.fromkeys(busy, 1.0)
        for lane in busy:
            for other in busy:
                if other == lane:
                    continue
                speeds[lane] *= self._keeps(names[lane], names[other])
                if {names[lane], names[other]} == {"h2d", "d2h"}:
                    speeds[lane] *= hardware.duplex_share
        self._speeds[active] = speeds
        return speeds


def _contention_names(costs: StepCosts, compute_lane: Lane) -> list[str]:
    """Under which name of hardware.LANES each lane's contention was measured."""
    emulated = costs.on_device and costs.hardware.gpu is None
    names = {lane: lane.value for lane in Lane}
    names[Lane.CPU] = "host_attention"
    if emulated:
        names[Lane.H2D] = names[Lane.D2H] = "host_copy"
    names[compute_lane] = "compute"
    return list(names.values())
