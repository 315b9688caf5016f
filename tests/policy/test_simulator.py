"""A simulated run obeys its schedule: lanes do one step at a time, nothing starts before what it needs, and no more."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import GIB, LAPTOP, T4, planned

from flexrun.config import Placement, Policy
from flexrun.core import Event, Lane, Tier
from flexrun.hardware import Hardware
from flexrun.placement import build_scheduler
from flexrun.policy import simulator
from flexrun.policy.cost import StepCosts
from flexrun.policy.layout import Budgets, Layout
from flexrun.policy.passes import job_passes
from flexrun.policy.simulator import Timeline, simulate_layout
from flexrun.schedule import Scheduler
from flexrun.steps import STREAMING, PassShape, Step, StepKind
from flexrun.workload import Workload

JOB = Workload.of([60, 20, 90, 33] * 4, [5, 2, 7, 3] * 4)
SPEC = planned("llama")
COMPUTE = {
    StepKind.EMBED,
    StepKind.ATTENTION_INPUTS,
    StepKind.ATTEND,
    StepKind.ATTENTION_OUTPUT,
    StepKind.MLP,
    StepKind.EXPERTS,
    StepKind.LOGITS,
}
ONE_STEP_A_UNIT = (StepKind.ATTENTION_INPUTS, StepKind.MLP, StepKind.LOGITS)
DISK, ON_GPU = Placement(0.0, 0.0, 1.0), Placement(1.0, 0.0)
NO_CONTENTION = dataclasses.replace(LAPTOP, contention={})
QUIET_T4 = dataclasses.replace(T4, contention={}, duplex_share=1.0)


def layout_of(policy: Policy, on_device: bool = False, spec=SPEC, job: Workload = JOB) -> Layout:
    return Layout.of(spec, policy, job, Budgets(8 * GIB, 8 * GIB if on_device else 0))


def decode_passes(layout: Layout, count: int) -> list[PassShape]:
    """One sequence of one token, ``count`` times."""
    return list(islice(job_passes(Workload.uniform(1, 1, count), layout.policy, layout.micro_batches), count))


@pytest.fixture
def timed(monkeypatch):
    """timed({kind: seconds}, between=0.0): steps take what the table says, others no time."""

    def set_durations(table: dict[StepKind, float], between: float = 0.0) -> None:
        class Table(StepCosts):
            def seconds_in_run(self, step: Step, shape: PassShape) -> float:
                return table.get(step.kind, 0.0)

            def between_passes_seconds(self, sequences: int) -> float:
                return between

        monkeypatch.setattr(simulator, "StepCosts", Table)

    return set_durations


# Cases that a person can work out ----------------------------------------------------------------------


def test_one_lane_takes_the_sum_of_its_steps(timed):
    layout = layout_of(Policy(sequences_in_flight=1))
    timed(dict.fromkeys(COMPUTE, 1.0), between=0.25)
    timeline = simulate_layout(layout, LAPTOP, decode_passes(layout, 3))
    one = 0.25 + 1 + 6 * 4 + 1  # embed, then inputs, attention, output and MLP of each layer, and the head
    assert timeline.pass_seconds == pytest.approx([one] * 3)
    assert timeline.seconds == pytest.approx(3 * one)
    assert timeline.busy_seconds[Lane.CPU] == pytest.approx(3 * (one - 0.25)), "planning a pass is on no lane"


def test_slow_copies_leave_the_last_units_compute_uncovered(timed):
    """13 units of 1 s; each module computes for a tenth of that: only what follows the last copy is added, once."""
    layout = layout_of(Policy(sequences_in_flight=1, kv=ON_GPU), on_device=True)
    timed({StepKind.COPY_WEIGHTS: 1.0, **dict.fromkeys(ONE_STEP_A_UNIT, 0.1)})
    timeline = simulate_layout(layout, QUIET_T4, decode_passes(layout, 3))
    assert timeline.pass_ends_seconds == pytest.approx([13.1, 26.1, 39.1]), "copies go on across the border"


@pytest.mark.parametrize("between, first_copy", [(0.5, 0.0), (0.0, 0.1)])
def test_slow_compute_leaves_the_first_copy_uncovered(timed, between, first_copy):
    """Unless it hides behind the planning of the pass."""
    layout = layout_of(Policy(sequences_in_flight=1, kv=ON_GPU), on_device=True)
    timed({StepKind.COPY_WEIGHTS: 0.1, **dict.fromkeys(ONE_STEP_A_UNIT, 1.0)}, between)
    timeline = simulate_layout(layout, QUIET_T4, decode_passes(layout, 3))
    one = 13 + between
    assert timeline.pass_ends_seconds == pytest.approx([first_copy + one, first_copy + 2 * one, first_copy + 3 * one])


def test_two_links_in_a_row_run_at_the_pace_of_the_slower(timed):
    layout = layout_of(Policy(sequences_in_flight=1, weights=DISK, kv=ON_GPU), on_device=True)
    timed({StepKind.READ_WEIGHTS: 1.0, StepKind.COPY_WEIGHTS: 0.3, **dict.fromkeys(ONE_STEP_A_UNIT, 0.2)})
    timeline = simulate_layout(layout, QUIET_T4, decode_passes(layout, 4))
    assert sum(timeline.pass_seconds[1:]) == pytest.approx(3 * 13, rel=0.05)
    assert timeline.busy_seconds[Lane.DISK_READ] == pytest.approx(4 * 13)
    assert timeline.busy_seconds[Lane.H2D] == pytest.approx(4 * 13 * 0.3)


def test_rows_of_an_embedding_on_disk_do_not_wait_behind_what_is_read_ahead(timed):
    """They hold up the first unit instead, which is used a layer's compute after them; 13 units of 1 s in all."""
    layout = layout_of(Policy(sequences_in_flight=1, weights=DISK))
    timed({StepKind.READ_WEIGHTS: 1.0, StepKind.READ_ROWS: 0.3, **dict.fromkeys(ONE_STEP_A_UNIT, 0.1)})
    timeline = simulate_layout(layout, NO_CONTENTION, decode_passes(layout, 2), events=True)
    (embed, _) = [event for event in timeline.events if event.name == "embed"]
    first_read = next(event for event in timeline.events if event.name == "read_weights")
    assert embed.start_seconds == pytest.approx(0.3)
    assert (first_read.start_seconds, first_read.end_seconds) == pytest.approx((0.0, 1.3))
    assert timeline.pass_ends_seconds[0] == pytest.approx(13.3 + 0.1)
    assert timeline.busy_seconds[Lane.DISK_READ] == pytest.approx(timeline.seconds - 0.1), "it never rests"


def test_rows_hold_up_the_weights_on_their_lane(timed):
    """What comes back from the CPU after 0.4 s takes 0.2 s of the link; the copy under way ends so much later."""
    policy = Policy(sequences_in_flight=1, attention_micro_batch=1)
    layout = layout_of(policy, on_device=True, spec=planned("llama", num_hidden_layers=2))
    timed({StepKind.COPY_WEIGHTS: 1.0, StepKind.ATTEND: 0.4, StepKind.RETURN_ATTENDED: 0.2})
    timeline = simulate_layout(layout, QUIET_T4, decode_passes(layout, 2)[1:], events=True)
    spans = {}
    for event in timeline.events:
        spans.setdefault(event.name, []).append((event.start_seconds, event.end_seconds))
    assert spans["attend"][0] == pytest.approx((1.0, 1.4)), "once the first unit is there"
    assert spans["return_attended"] == [pytest.approx((1.4, 1.6)), pytest.approx((3.6, 3.8))]
    assert spans["copy_weights"][:4] == [pytest.approx(span) for span in ((0, 1), (1, 2.2), (2.2, 3.2), (3.2, 4.4))]
    assert timeline.busy_seconds[Lane.H2D] == pytest.approx(timeline.seconds)


def test_attention_on_the_cpu_runs_beside_that_on_the_gpu_but_not_beside_its_layer(timed):
    """Two micro-batches, one attended on either side for 2 s; the projections take 1 s and wait for both."""
    policy = Policy(sequences_in_flight=2, attention_micro_batch=1, weights=Placement(1.0, 0.0), kv=Placement(0.5, 0.5))
    layout = layout_of(policy, on_device=True)
    timed({StepKind.ATTEND: 2.0, StepKind.ATTENTION_OUTPUT: 1.0})
    (shape,) = job_passes(Workload.uniform(2, 1, 1), policy, layout.micro_batches)
    timeline = simulate_layout(layout, QUIET_T4, [shape])
    assert timeline.seconds == pytest.approx(6 * 3)
    assert timeline.busy_seconds[Lane.CPU] == pytest.approx(6 * 2)
    assert timeline.busy_seconds[Lane.GPU] == pytest.approx(6 * 3)


def test_lanes_slow_each_other_as_the_machine_says(timed):
    """Three copies of 1 s at 0.8 of their speed take 3.75 s, in which compute does 1.875 s of its 10."""
    spec = planned("llama", num_hidden_layers=1)
    layout = layout_of(Policy(sequences_in_flight=1, kv=ON_GPU), on_device=True, spec=spec)
    shares = {"compute": {"h2d": 0.5}, "h2d": {"compute": 0.8}}
    timed({StepKind.EMBED: 10.0, StepKind.COPY_WEIGHTS: 1.0})
    machine = dataclasses.replace(QUIET_T4, contention=shares)
    timeline = simulate_layout(layout, machine, decode_passes(layout, 1))
    assert timeline.busy_seconds[Lane.H2D] == pytest.approx(3.75)
    assert timeline.seconds == pytest.approx(3.75 + 10 - 1.875)


def test_copies_to_an_emulated_device_contend_like_a_copy_thread(timed, monkeypatch):
    monkeypatch.setattr(simulator, "BESIDE_EMULATED_LINK", 1.0)  # what the profile says alone
    spec = planned("llama", num_hidden_layers=1)
    layout = layout_of(Policy(sequences_in_flight=1, kv=ON_GPU), on_device=True, spec=spec)
    timed({StepKind.EMBED: 10.0, StepKind.COPY_WEIGHTS: 1.0})
    shares = {"host_copy": {"compute": 0.5}, "h2d": {"compute": 0.9}, "compute": {"host_copy": 0.5, "h2d": 0.9}}
    machine = dataclasses.replace(LAPTOP, contention=shares)
    timeline = simulate_layout(layout, machine, decode_passes(layout, 1))
    assert timeline.busy_seconds[Lane.H2D] == pytest.approx(6.0)
    assert timeline.seconds == pytest.approx(6 + 10 - 3)


def test_an_emulated_link_held_to_a_quarter_of_a_copy_has_time_left(timed, monkeypatch):
    """Copies at half their speed still keep up, and compute loses half of its speed for a quarter of the time."""
    monkeypatch.setattr(simulator, "BESIDE_EMULATED_LINK", 1.0)
    spec = planned("llama", num_hidden_layers=1)
    layout = layout_of(Policy(sequences_in_flight=1, kv=ON_GPU), on_device=True, spec=spec)
    timed({StepKind.EMBED: 10.0, StepKind.COPY_WEIGHTS: 1.0})
    slow = dataclasses.replace(LAPTOP.host_copy, bytes_per_second=LAPTOP.host_copy.bytes_per_second / 4)
    shares = {"host_copy": {"compute": 0.5}, "compute": {"host_copy": 0.5}}
    timeline = simulate_layout(
        layout, dataclasses.replace(LAPTOP, h2d=slow, contention=shares), decode_passes(layout, 1)
    )
    assert timeline.busy_seconds[Lane.H2D] == pytest.approx(3.0)
    assert timeline.seconds == pytest.approx(3 + 10 - 3 * 0.875)


def test_both_ways_of_the_link_share_it(timed):
    """KV comes for one micro-batch while the other's new rows go: at duplex_share both take longer."""
    policy = Policy(sequences_in_flight=1, weights=Placement(1.0, 0.0), cpu_attention_share=0.0)
    layout = layout_of(policy, on_device=True)
    timed({StepKind.LOAD_KV: 1.0, StepKind.SAVE_KV: 1.0})
    passes = decode_passes(layout, 2)[1:]  # of the first nothing is cached yet
    machine = dataclasses.replace(T4, contention={}, duplex_share=0.5)
    timeline = simulate_layout(layout, machine, passes)
    # The first load starts together with the first save; both take 2 s, as does every later pair.
    assert timeline.busy_seconds[Lane.H2D] == pytest.approx(12.0)
    assert timeline.seconds == pytest.approx(12.0)
    alone = simulate_layout(layout, dataclasses.replace(machine, duplex_share=1.0), passes)
    assert alone.seconds == pytest.approx(6.0)


# Whatever the policy -----------------------------------------------------------------------------------


def scheduler_of(layout: Layout) -> Scheduler:
    return build_scheduler(
        layout.spec, layout.placement, layout.account, on_device=layout.on_device, policy=layout.policy
    )


def naive(layout: Layout, machine: Hardware, passes: list[PassShape]) -> tuple[list[Event], list[float]]:
    """Every step as soon as its queue and what it depends on are free; a pass is emitted when the last one's compute
    is over. Right where lanes do not disturb each other.

    Rows hold up weights on their lane, also weights that were emitted before them: so it is done over again, each time
    with the rows where they were the last time, until nothing moves.
    """
    rows: dict[Lane, list[tuple[float, float]]] = {}
    for _ in range(500):
        events, pass_ends = _with_rows_at(rows, layout, machine, passes)
        before, rows = rows, defaultdict(list)
        for event in events:
            if StepKind(event.name) not in STREAMING:
                rows[event.lane].append((event.start_seconds, event.end_seconds))
        if rows == before:
            return events, pass_ends
    raise AssertionError("it never comes to rest")


def _with_rows_at(rows, layout, machine, passes):
    costs = StepCosts(layout.spec, layout.policy, layout.placement, machine, on_device=layout.on_device)
    scheduler = scheduler_of(layout)
    free, ends, events, pass_ends, emitted = defaultdict(float), {}, [], [], 0.0
    for index, shape in enumerate(passes):
        free[scheduler.compute_lane, False] += costs.between_passes_seconds(
            sum(part.decode_tokens for part in shape.micro_batches)
        )
        for step in scheduler.pass_steps(dataclasses.replace(shape, index=index)):
            queue = step.lane, step.kind in STREAMING
            start = max(free[queue], emitted, *(ends[each] for each in step.depends_on), 0.0)
            end = start + costs.seconds_in_run(step, shape)
            if step.kind in STREAMING:
                for held, let_go in rows.get(step.lane, ()):
                    if held < end and let_go > start:
                        end += let_go - max(held, start)
            free[queue] = ends[step.lane, step.order] = end
            events.append(Event(step.kind.value, step.lane, start, end, index, step.layer))
        emitted = free[scheduler.compute_lane, False]
        pass_ends.append(emitted)
    return events, pass_ends


def by_queue(events: list[Event]) -> dict[tuple[Lane, bool], list[Event]]:
    """Events of each lane, those of weights apart, for they have an order of their own."""
    queues = defaultdict(list)
    for event in events:
        queues[event.lane, StepKind(event.name) in STREAMING].append(event)
    return queues


def covered_seconds(events: list[Event]) -> float:
    """How long at least one of them was under way."""
    covered, reached = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.start_seconds):
        covered += max(event.end_seconds - max(event.start_seconds, reached), 0.0)
        reached = max(reached, event.end_seconds)
    return covered


@st.composite
def layouts(draw) -> Layout:
    on_device = draw(st.booleans())
    tenths = [draw(st.integers(0, 10)) if on_device else 0, draw(st.integers(0, 10)), draw(st.integers(0, 10))]
    weights = Placement(*(part / sum(tenths) for part in tenths)) if sum(tenths) else Placement()
    homes = [(0, 1, 0), (0.5, 0.5, 0), (0.25, 0.5, 0.25)] if on_device else [(0, 1, 0), (0, 0.5, 0.5)]
    policy = Policy(
        sequences_in_flight=draw(st.integers(1, 8)),
        tokens_per_pass=draw(st.integers(8, 100)),
        attention_micro_batch=draw(st.integers(1, 4)),
        weights=weights,
        kv=Placement(*draw(st.sampled_from(homes))),
        cpu_attention_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        half_batches=draw(st.booleans()),
    )
    spec = planned(draw(st.sampled_from(["llama", "gqa", "deepseek"])), num_hidden_layers=3)
    return layout_of(policy, on_device, spec)


def some_passes(layout: Layout) -> list[PassShape]:
    return list(islice(job_passes(JOB, layout.policy, layout.micro_batches), 4))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(layouts(), st.sampled_from([NO_CONTENTION, QUIET_T4]))
def test_without_contention_every_step_runs_as_soon_as_it_may(layout, machine):
    passes = some_passes(layout)
    timeline = simulate_layout(layout, machine, passes, events=True)
    expected, pass_ends = naive(layout, machine, passes)
    assert timeline.pass_ends_seconds == pytest.approx(pass_ends, rel=1e-9)
    told, wanted = by_queue(timeline.events), by_queue(expected)
    for queue, events in told.items():
        # reads ahead that were still under way when the run ended are not told
        assert len(events) <= len(wanted[queue])
        for event, other in zip(events, wanted[queue]):
            assert (event.name, event.layer, event.pass_index) == (other.name, other.layer, other.pass_index)
            assert (event.start_seconds, event.end_seconds) == pytest.approx((other.start_seconds, other.end_seconds))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(layouts(), st.sampled_from([LAPTOP, T4]))
def test_a_timeline_obeys_its_schedule(layout, machine):
    passes = some_passes(layout)
    timeline = simulate_layout(layout, machine, passes, events=True)
    queues = by_queue(timeline.events)
    for events in queues.values():
        for first, second in pairwise(events):
            assert first.end_seconds <= second.start_seconds + 1e-9, "a queue does one step at a time"
    scheduler = scheduler_of(layout)
    steps = [
        step
        for index, shape in enumerate(passes)
        for step in scheduler.pass_steps(dataclasses.replace(shape, index=index))
    ]
    told = {queue: iter(events) for queue, events in queues.items()}
    found = {}
    for step in steps:
        event = next(told.get((step.lane, step.kind in STREAMING), iter(())), None)
        if event is None:
            continue  # a read ahead that the end of the run cut off
        found[step.lane, step.order] = event
        assert (event.name, event.layer) == (step.kind.value, step.layer)
        for each in step.depends_on:
            assert found[each].end_seconds <= event.start_seconds + 1e-9
    last = max(event.end_seconds for event in timeline.events if event.lane is scheduler.compute_lane)
    assert timeline.pass_ends_seconds == sorted(timeline.pass_ends_seconds)
    assert timeline.seconds == pytest.approx(last)
    assert timeline.seconds >= max(timeline.busy_seconds.values()) - 1e-9
    for lane, busy in timeline.busy_seconds.items():
        told_busy = covered_seconds([event for event in timeline.events if event.lane is lane])
        assert busy <= told_busy + 1e-9
        if lane not in simulator.SHARED:
            assert busy == pytest.approx(told_busy)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(layouts())
def test_contention_never_makes_a_run_faster(layout):
    passes = some_passes(layout)
    alone = simulate_layout(layout, NO_CONTENTION, passes)
    shared = simulate_layout(layout, LAPTOP, passes)
    assert shared.seconds >= alone.seconds * (1 - 1e-9)


def test_events_are_told_only_where_they_are_asked_for():
    layout = layout_of(Policy(sequences_in_flight=2))
    passes = some_passes(layout)
    quiet, told = (simulate_layout(layout, LAPTOP, passes, events=events) for events in (False, True))
    assert quiet.events == []
    assert quiet.pass_ends_seconds == told.pass_ends_seconds
    assert {event.pass_index for event in told.events} == {0, 1, 2, 3}
    kinds = {event.name for event in told.events}
    assert {"embed", "attention_inputs", "attend", "attention_output", "mlp", "logits"} <= kinds


def test_no_pass_takes_no_time():
    timeline = simulate_layout(layout_of(Policy()), LAPTOP, [])
    assert (timeline.seconds, timeline.pass_seconds) == (0.0, [])
    assert timeline == Timeline()


def test_kv_on_disk_is_simulated_too():
    policy = Policy(sequences_in_flight=4, attention_micro_batch=1, kv=Placement(0.0, 0.5, 0.5))
    layout = layout_of(policy)
    passes = some_passes(layout)
    assert {part.home for shape in passes for part in shape.micro_batches} == {Tier.CPU, Tier.DISK}
    timeline = simulate_layout(layout, LAPTOP, passes, events=True)
    reads = [event for event in timeline.events if event.name == "read_kv"]
    writes = [event for event in timeline.events if event.name == "write_kv"]
    parts = [part for shape in passes for part in shape.micro_batches if part.home is Tier.DISK]
    assert len(reads) == 6 * sum(part.kv_tokens > part.query_tokens for part in parts)
    assert len(writes) == 6 * len(parts)
