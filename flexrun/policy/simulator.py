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
    def __init__(self, layout: Layout, costs: StepCosts, keep_events: bool):
        self._costs, self._keep_events = costs, keep_events
        self._scheduler = build_scheduler(layout.spec, layout.placement, layout.account, on_device=layout.on_device)
        self._compute = self._scheduler.compute_lane
        self._names = _contention_names(costs, self._compute)
        self._speeds: dict[frozenset[Lane], list[tuple[Lane, float]]] = {}
        self._waiting: dict[Lane, deque[tuple[Step | None, float]]] = {lane: deque() for lane in Lane}
        self._running: dict[Lane, list] = {}  # lane -> [step, seconds of work left, start]
        self._done = dict.fromkeys(Lane, 0)
        self._now = 0.0
        self._timeline = Timeline()

    def run(self, passes: Iterable[PassShape]) -> Timeline:
        for index, shape in enumerate(passes):
            shape = dataclasses.replace(shape, index=index)  # the scheduler counts passes from its first
            sequences = sum(micro_batch.decode_tokens for micro_batch in shape.micro_batches)
            between = self._costs.between_passes_seconds(sequences)
            self._waiting[self._compute].append((None, between))
            durations: dict[tuple, float] = {}
            for step in self._scheduler.pass_steps(shape):
                key = (step.kind, step.layer, step.micro_batch, step.unit, step.lane)
                seconds = durations.get(key)
                if seconds is None:
                    durations[key] = seconds = self._costs.seconds_in_run(step, shape)
                self._waiting[step.lane].append((step, seconds))
            self._run_pass()
            self._timeline.pass_ends_seconds.append(self._now)
        return self._timeline

    def _run_pass(self) -> None:
        """Advance until the compute lane has nothing left: the next pass is planned only then."""
        running, waiting, compute = self._running, self._waiting, self._compute
        while waiting[compute] or compute in running:
            for lane, queue in waiting.items():
                if queue and lane not in running and self._ready(queue[0][0]):
                    step, seconds = queue.popleft()
                    running[lane] = [step, seconds, self._now]
            if not running:
                raise ExecutionError("the schedule cannot go on: every lane waits for another")
            self._advance()

    def _ready(self, step: Step | None) -> bool:
        return step is None or all(self._done[lane] > order for lane, order in step.depends_on)

    def _advance(self) -> None:
        """To the moment at which the next running step ends."""
        running = self._running
        if len(running) == 1:
            ((lane, entry),) = running.items()
            self._now += entry[1]
            self._finish(lane)
            return
        speeds = self._speeds_of(frozenset(running))
        elapsed = min(running[lane][1] / speed for lane, speed in speeds)
        self._now += elapsed
        for lane, speed in speeds:
            entry = running[lane]
            entry[1] -= elapsed * speed
            if entry[1] <= 1e-12:
                self._finish(lane)

    def _finish(self, lane: Lane) -> None:
        step, _, start_seconds = self._running.pop(lane)
        if step is None:
            return
        self._done[lane] += 1
        self._timeline.busy_seconds[lane] += self._now - start_seconds
        if self._keep_events:
            self._timeline.events.append(
                Event(
                    step.kind.value, lane, start_seconds, self._now, step.pass_index, step.layer, step.bytes, step.flops
                )
            )

    def _keeps(self, lane: str, other: str) -> float:
        keeps = self._costs.hardware.keeps(lane, other)
        if (lane, other) == ("compute", "host_copy") and keeps < 1:
            # An emulated link takes a core, and threads that compute wait for each other after every operation: with
            # the short operations of a run they stand still more than the profile's long ones.
            return min(keeps, BESIDE_EMULATED_LINK)
        return keeps

    def _speeds_of(self, active: frozenset[Lane]) -> list[tuple[Lane, float]]:
        if active not in self._speeds:
            hardware, speeds = self._costs.hardware, []
            for lane in active:
                speed = 1.0
                for other in active - {lane}:
                    speed *= self._keeps(self._names[lane], self._names[other])
                    if {self._names[lane], self._names[other]} == {"h2d", "d2h"}:
                        speed *= hardware.duplex_share
                speeds.append((lane, speed))
            self._speeds[active] = speeds
        return self._speeds[active]


def _contention_names(costs: StepCosts, compute_lane: Lane) -> dict[Lane, str]:
    """Under which name of hardware.LANES each lane's contention was measured."""
    emulated = costs.on_device and costs.hardware.gpu is None
    names = {lane: lane.value for lane in Lane}
    names[Lane.CPU] = "host_attention"
    if emulated:
        names[Lane.H2D] = names[Lane.D2H] = "host_copy"
    names[compute_lane] = "compute"
    return names
