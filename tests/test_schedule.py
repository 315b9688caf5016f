"""Every list of steps runs to its end on lanes that keep their order, and no byte is overwritten while it is needed.

A small machine runs random schedules: lanes start their steps in order, in any interleaving, the disk lane several
at once, as its threads do; a pass is emitted when the compute of the last one is done.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun.core import Lane, Tier
from flexrun.schedule import Scheduler
from flexrun.steps import MicroBatchShape, ModelWork, PassShape, Step, StepKind, WeightUnit

WORK = ModelWork(2, 3, 5, (7,) * 8, 11, 13, 17, 19, 23, 29.0)
DISK_STEPS_UNDER_WAY = 3
HOST, DEVICE = "host ring", "device ring"
COMPUTE_WITH_WEIGHTS = (
    StepKind.ATTENTION_INPUTS,
    StepKind.ATTENTION_OUTPUT,
    StepKind.MLP,
    StepKind.EXPERTS,
    StepKind.LOGITS,
)
STREAMING = (StepKind.READ_WEIGHTS, StepKind.COPY_WEIGHTS)


@dataclass
class Load:
    """A unit's bytes in a ring, and how many steps have yet to use them."""

    start: int
    end: int
    users_left: int
    written: bool = False


class Machine:
    """Runs steps in a random order that lanes and dependencies allow, and checks what each one touches."""

    def __init__(self, scheduler: Scheduler, units: list[WeightUnit], rings: dict[str, int], chooser: random.Random):
        self.scheduler, self.units, self.rings, self.chooser = scheduler, units, rings, chooser
        self.pace = {lane: chooser.choice((1.0, 1.0, 0.001)) for lane in Lane}  # a slow lane brings races to light
        self.compute_ring = DEVICE if scheduler.on_device else HOST
        self.queues: dict[Lane, deque[Step]] = defaultdict(deque)
        self.under_way: list[Step] = []
        self.ended: dict[Lane, set[int]] = defaultdict(set)
        self.done: Counter = Counter()  # finished prefix of each lane
        self.emitted: Counter = Counter()
        self.turns: dict[Step, int] = {}  # which of a unit's loads a step makes or uses: one a pass
        self.started: Counter = Counter()
        self.live: dict[str, dict[tuple[int, int], Load]] = {HOST: {}, DEVICE: {}}
        self.slots: dict[int, Step] = {}
        self.host_slots: dict[int, Step] = {}  # READ_KV whose bytes are still needed
        self.homes: dict[int, Tier] = {}  # of each micro-batch

    def run_pass(self, shape: PassShape) -> list[Step]:
        pending = [step for step in self._unfinished() if step.kind not in STREAMING]
        assert not pending, f"a pass begins, and replaces the rows that these still need: {pending}"
        self.homes |= {micro_batch.index: micro_batch.home for micro_batch in shape.micro_batches}
        steps = self.scheduler.pass_steps(shape)
        for step in steps:
            assert step.order == self.emitted[step.lane], "orders count the steps of a lane"
            for lane, order in step.depends_on:
                assert order < self.emitted[lane], f"{step} depends on a step that is not emitted yet"
            self.emitted[step.lane] += 1
            self.queues[step.lane].append(step)
        compute = self.scheduler.compute_lane
        while self.done[compute] < self.emitted[compute]:
            self._advance()
        return steps

    def drain(self) -> None:
        while self._unfinished():
            self._advance()

    def _unfinished(self) -> list[Step]:
        return [*self.under_way, *(step for queue in self.queues.values() for step in queue)]

    def _advance(self) -> None:
        heads = [queue[0] for queue in self.queues.values() if queue]
        moves = [(self._start, step) for step in heads if self._may_start(step)]
        moves += [(self._end, step) for step in self.under_way]
        assert moves, f"deadlock before {heads}"
        ((move, step),) = self.chooser.choices(moves, [self.pace[step.lane] for _, step in moves])
        move(step)

    def _may_start(self, step: Step) -> bool:
        limit = DISK_STEPS_UNDER_WAY if step.lane is Lane.DISK_READ else 1
        free = sum(other.lane is step.lane for other in self.under_way) < limit
        return free and all(self.done[lane] > order for lane, order in step.depends_on)

    def _start(self, step: Step) -> None:
        self.turns[step] = self.started[step.kind, step.unit] if step.kind in STREAMING else step.pass_index
        self.started[step.kind, step.unit] += 1
        self.queues[step.lane].popleft()
        unit = self.units[step.unit]
        moved_bytes = unit.disk_bytes + unit.host_bytes
        if step.kind is StepKind.READ_WEIGHTS:
            self._fill(HOST, step, unit.disk_bytes)
        elif step.kind is StepKind.COPY_WEIGHTS:
            if unit.disk_bytes:
                self._check_there(HOST, step, step.source_offset, unit.disk_bytes)
            self._fill(DEVICE, step, moved_bytes)
        elif step.kind in COMPUTE_WITH_WEIGHTS and moved_bytes:
            self._check_there(self.compute_ring, step, step.offset, moved_bytes)
        elif step.kind is StepKind.READ_KV:
            assert step.offset not in self.host_slots, "a staging slot of the host is filled while it is in use"
            self.host_slots[step.offset] = step
            assert not [other for other in self._unfinished() if self._saves_for(other, step)]
        elif step.kind is StepKind.LOAD_KV:
            assert step.offset not in self.slots, "a staging slot is filled while it is in use"
            self.slots[step.offset] = step
            assert not [other for other in self._unfinished() if self._saves_for(other, step)]
            self._check_read(step)
        elif step.kind is StepKind.ATTEND:
            if self._load_of(step):
                assert self._load_of(step) not in self.under_way, "KV is attended before it has arrived"
            else:
                self._check_read(step)
        elif step.kind is StepKind.WRITE_KV:
            makers = (StepKind.ATTENTION_INPUTS, StepKind.OFFLOAD_QUERY, StepKind.SAVE_KV)
            late = [other for other in self._unfinished() if other.kind in makers and _same_kv(other, step)]
            assert not late, f"rows are written before {late} has made them"
        if step.kind is StepKind.ATTENTION_INPUTS:
            late = [other for other in self._unfinished() if self._reads_rows_before(other, step)]
            assert not late, f"{step} overwrites rows that {late} still needs"
        self.under_way.append(step)

    def _end(self, step: Step) -> None:
        self.under_way.remove(step)
        self.ended[step.lane].add(step.order)
        while self.done[step.lane] in self.ended[step.lane]:
            self.done[step.lane] += 1
        key = self.turns[step], step.unit
        if step.kind is StepKind.READ_WEIGHTS:
            self.live[HOST][key].written = True
        elif step.kind is StepKind.COPY_WEIGHTS:
            self.live[DEVICE][key].written = True
            if self.units[step.unit].disk_bytes:
                self.live[HOST][key].users_left -= 1
        elif step.kind in COMPUTE_WITH_WEIGHTS and key in self.live[self.compute_ring]:
            self.live[self.compute_ring][key].users_left -= 1
        elif step.kind is StepKind.ATTEND and self._load_of(step):
            del self.slots[step.offset]
        if step.kind is StepKind.LOAD_KV or (step.kind is StepKind.ATTEND and step.lane is not Lane.GPU):
            self.host_slots = {slot: read for slot, read in self.host_slots.items() if not _same_kv(read, step)}

    def _fill(self, ring: str, step: Step, nbytes: int) -> None:
        start, end = step.offset, step.offset + nbytes
        assert 0 <= start < end <= self.rings[ring]
        for key, load in list(self.live[ring].items()):
            if load.start < end and start < load.end:
                assert not load.users_left, f"{step} overwrites {key} in the {ring}, which is still needed"
                del self.live[ring][key]
        by_copy = ring == HOST and self.scheduler.on_device
        users = 1 if by_copy or self.units[step.unit].module != "attention" else 2
        self.live[ring][self.turns[step], step.unit] = Load(start, end, users)

    def _check_there(self, ring: str, step: Step, offset: int, nbytes: int) -> None:
        load = self.live[ring].get((self.turns[step], step.unit))
        assert load is not None, f"{step} uses a unit that was never loaded, or is overwritten already"
        assert (load.start, load.end) == (offset, offset + nbytes), "a step looks at another place than was filled"
        assert load.written, f"{step} starts before its weights have arrived"

    def _check_read(self, step: Step) -> None:
        """KV that lives on disk is in its staging slot before it is copied on or attended."""
        if self.homes[step.micro_batch] is not Tier.DISK:
            return
        (read,) = [read for read in self.host_slots.values() if _same_kv(read, step)]
        assert read not in self.under_way, f"{step} starts before {read} has ended"
        if step.kind is StepKind.ATTEND:
            assert read.offset == step.offset, "attention looks at another slot than was filled"

    def _load_of(self, attend: Step) -> Step | None:
        load = self.slots.get(attend.offset)
        same = load and (load.layer, load.micro_batch) == (attend.layer, attend.micro_batch)
        return load if same and attend.lane is Lane.GPU else None

    @staticmethod
    def _saves_for(other: Step, load: Step) -> bool:
        """Whether ``other`` writes the rows, on the host or on disk, that ``load`` is about to read."""
        same = (other.layer, other.micro_batch) == (load.layer, load.micro_batch)
        return other.kind in (StepKind.SAVE_KV, StepKind.WRITE_KV) and same and other.pass_index < load.pass_index

    @staticmethod
    def _reads_rows_before(other: Step, inputs: Step) -> bool:
        """Whether ``other`` reads the q, k, v rows of an earlier layer or pass, which ``inputs`` overwrites."""
        reads = other.kind in (StepKind.SAVE_KV, StepKind.OFFLOAD_QUERY, StepKind.WRITE_KV, StepKind.ATTEND)
        return reads and (other.pass_index, other.layer) < (inputs.pass_index, inputs.layer)


def _same_kv(step: Step, other: Step) -> bool:
    """Whether two steps are about the same rows: those of a layer and, where one names it, of a micro-batch."""
    same = -1 in (step.micro_batch, other.micro_batch) or step.micro_batch == other.micro_batch
    return same and (step.pass_index, step.layer) == (other.pass_index, other.layer)


def unit_keys(layers: int, groups: int = 0) -> list[tuple[int, str]]:
    """groups: of routed experts in each odd layer."""
    experts = [f"experts.{group}" for group in range(groups)]
    keys = [(layer, module) for layer in range(layers) for module in ("attention", "mlp", *experts * (layer % 2))]
    return [*keys, (layers, "head")]


def make_units(layers: int, sizes: list[tuple[int, int]], on_device: bool, groups: int = 0) -> list[WeightUnit]:
    return [
        WeightUnit(index, layer, module, disk, host if on_device else 0, 2 if module.startswith("experts") else 0)
        for index, ((layer, module), (disk, host)) in enumerate(zip(unit_keys(layers, groups), sizes, strict=True))
    ]


def stream_sizes(units: list[WeightUnit]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((largest unit, largest layer) from disk, the same from disk and host)."""
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for unit in units:
        sums[unit.layer][0] += unit.disk_bytes
        sums[unit.layer][1] += unit.disk_bytes + unit.host_bytes
    return (
        (max(unit.disk_bytes for unit in units), max(disk for disk, _ in sums.values())),
        (max(unit.disk_bytes + unit.host_bytes for unit in units), max(both for _, both in sums.values())),
    )


@st.composite
def machines(draw, roomy: bool = False):
    on_device = draw(st.booleans())
    layers, groups = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    size, count = st.one_of(st.just(0), st.integers(1, 9)), len(unit_keys(layers, groups))
    sizes = draw(st.lists(st.tuples(size, size), min_size=count, max_size=count))
    units = make_units(layers, sizes, on_device, groups)
    rings = {}
    for name, (unit_bytes, layer_bytes) in zip((HOST, DEVICE), stream_sizes(units)):
        two_layers = 2 * layer_bytes + unit_bytes
        rings[name] = two_layers if roomy else draw(st.integers(unit_bytes, max(unit_bytes, two_layers + 5)))
    scheduler = Scheduler(
        units,
        WORK,
        layers,
        compute_lane=Lane.GPU if on_device else Lane.CPU,
        host_ring_bytes=rings[HOST],
        device_ring_bytes=rings[DEVICE] if on_device else 0,
        read_embedding_rows=draw(st.booleans()),
        kv_slots=draw(st.integers(1, 3)),
    )
    homes = [(Tier.CPU, Lane.CPU), (Tier.DISK, Lane.CPU)]
    if on_device:
        homes += [(Tier.GPU, Lane.GPU), (Tier.CPU, Lane.GPU), (Tier.DISK, Lane.GPU)]
    places = draw(st.lists(st.sampled_from(homes), min_size=1, max_size=4))
    shapes = []
    passes = draw(st.integers(1, 5))
    for index in range(passes):
        present = draw(st.sets(st.integers(0, len(places) - 1), min_size=1))
        micro_batches = tuple(
            MicroBatchShape(number, tokens := draw(st.integers(1, 5)), tokens + 2, tokens * 3, *places[number])
            for number in sorted(present)
        )
        tokens = sum(micro_batch.query_tokens for micro_batch in micro_batches)
        more = index + 1 < passes and draw(st.booleans())
        shapes.append(PassShape(index, tokens, 1, micro_batches, more))
    return scheduler, units, rings, shapes, random.Random(draw(st.integers(0, 1 << 32)))


@settings(deadline=None, derandomize=True, max_examples=250)
@given(machines())
def test_any_schedule_runs_to_its_end_and_never_overwrites_what_is_needed(drawn):
    scheduler, units, rings, shapes, chooser = drawn
    machine = Machine(scheduler, units, rings, chooser)
    steps = [step for shape in shapes for step in machine.run_pass(shape)]
    machine.drain()
    reads = [step.unit for step in steps if step.kind is StepKind.READ_WEIGHTS]
    assert reads == [unit.index for unit in units if unit.disk_bytes] * len(shapes), "each unit once a pass, in order"
    copies = [step.unit for step in steps if step.kind is StepKind.COPY_WEIGHTS]
    moved = [unit.index for unit in units if unit.disk_bytes + unit.host_bytes]
    assert copies == (moved * len(shapes) if scheduler.on_device else [])
    for step in steps:
        if step.kind is StepKind.READ_WEIGHTS:
            assert step.bytes == units[step.unit].disk_bytes
    for step in (step for step in steps if step.kind in (StepKind.READ_KV, StepKind.WRITE_KV)):
        (part,) = [part for part in shapes[step.pass_index].micro_batches if part.index == step.micro_batch]
        assert part.home is Tier.DISK
        new = part.query_tokens
        assert step.bytes == 13 * (part.kv_tokens - new if step.kind is StepKind.READ_KV else new)
    for kind in (StepKind.READ_KV, StepKind.WRITE_KV):
        slabs = sum(part.home is Tier.DISK for shape in shapes for part in shape.micro_batches)
        assert sum(step.kind is kind for step in steps) == scheduler.num_layers * slabs
    experts = Counter((step.pass_index, step.unit) for step in steps if step.kind is StepKind.EXPERTS)
    assert experts == Counter((shape.index, unit.index) for shape in shapes for unit in units if unit.experts)
    attends = Counter((step.pass_index, step.layer, step.micro_batch) for step in steps if step.kind is StepKind.ATTEND)
    assert attends == Counter(
        (shape.index, layer, micro_batch.index)
        for shape in shapes
        for layer in range(scheduler.num_layers)
        for micro_batch in shape.micro_batches
    )


@settings(deadline=None, derandomize=True, max_examples=60)
@given(machines())
def test_nothing_is_read_ahead_of_a_pass_that_does_not_follow(drawn):
    scheduler, units, _, shapes, _ = drawn
    streamed = sum(unit.disk_bytes > 0 for unit in units)
    reads = 0
    for number, shape in enumerate(shapes):
        reads += sum(step.kind is StepKind.READ_WEIGHTS for step in scheduler.pass_steps(shape))
        if shape.more:
            assert reads >= streamed * (number + 1)
        else:
            assert reads == streamed * (number + 1)


@settings(deadline=None, derandomize=True, max_examples=120)
@given(machines(roomy=True))
def test_two_layers_are_in_flight_where_the_ring_has_room(drawn):
    """Before a layer's first step, its weights and all of the next layer's are under way, also across passes."""
    scheduler, units, _, shapes, _ = drawn
    kind = StepKind.COPY_WEIGHTS if scheduler.on_device else StepKind.READ_WEIGHTS
    moved = [unit for unit in units if unit.disk_bytes + unit.host_bytes and (scheduler.on_device or unit.disk_bytes)]
    layers = scheduler.num_layers + 1  # the head counts as one
    emitted = 0
    for number, shape in enumerate(shapes):
        for step in scheduler.pass_steps(shape):
            emitted += step.kind is kind
            if step.kind not in (StepKind.ATTENTION_INPUTS, StepKind.LOGITS):
                continue
            next_pass, next_layer = divmod(number * layers + step.layer + 1, layers)
            if next_pass > number and not shape.more:
                continue
            needed = next_pass * len(moved) + sum(unit.layer <= next_layer for unit in moved)
            assert emitted >= needed, f"at {step.kind} of layer {step.layer}, pass {number}"


def test_weights_cross_the_pass_border():
    units = make_units(3, [(4, 0)] * 7, False)
    scheduler = Scheduler(units, WORK, 3, compute_lane=Lane.CPU, host_ring_bytes=20)
    micro_batches = (MicroBatchShape(0, 1, 1, 1, Tier.CPU, Lane.CPU),)
    steps = scheduler.pass_steps(PassShape(0, 1, 1, micro_batches, True))
    reads = [step.unit for step in steps if step.kind is StepKind.READ_WEIGHTS]
    assert reads[:7] == list(range(7))
    assert reads[7:11] == [0, 1, 2, 3], "two layers of the next pass are read before this one ends"


def test_groups_of_experts_run_one_after_another_behind_the_router():
    units = make_units(2, [(2, 0)] * len(unit_keys(2, 3)), False, groups=3)
    scheduler = Scheduler(units, WORK, 2, compute_lane=Lane.CPU, host_ring_bytes=40)
    part = MicroBatchShape(0, 4, 4, 10, Tier.CPU, Lane.CPU)
    steps = [step for step in scheduler.pass_steps(PassShape(0, 4, 1, (part,), False)) if step.layer == 1]
    compute = [(step.kind, step.unit) for step in steps if step.kind not in STREAMING]
    inputs, router, first = (
        unit.index for unit in units if unit.layer == 1 and unit.module in ("attention", "mlp", "experts.0")
    )
    assert compute == [
        (StepKind.ATTENTION_INPUTS, inputs),
        (StepKind.ATTEND, -1),
        (StepKind.ATTENTION_OUTPUT, inputs),
        (StepKind.MLP, router),
        *((StepKind.EXPERTS, first + group) for group in range(3)),
    ]
    assert [step.flops for step in steps if step.kind is StepKind.EXPERTS] == [4 * 2 * 29] * 3


@pytest.mark.parametrize("on_device, lane", [(False, Lane.CPU), (True, Lane.CPU), (True, Lane.GPU)])
def test_kv_on_disk_is_read_before_it_is_attended_and_written_after_it_is_made(on_device, lane):
    compute = Lane.GPU if on_device else Lane.CPU
    units = make_units(1, [(0, 0)] * 3, on_device)
    scheduler = Scheduler(units, WORK, 1, compute_lane=compute, host_ring_bytes=0, kv_slots=2)
    parts = tuple(MicroBatchShape(index, 1, 9, 9, Tier.DISK, lane) for index in range(3))
    first = scheduler.pass_steps(PassShape(0, 3, 3, parts, True))
    reads = [step for step in first if step.kind is StepKind.READ_KV]
    assert [(step.bytes, step.offset) for step in reads] == [(8 * 13, 0), (8 * 13, 1), (8 * 13, 0)]
    users = [step for step in first if step.kind is (StepKind.LOAD_KV if lane is Lane.GPU else StepKind.ATTEND)]
    assert all((Lane.DISK_READ, read.order) in user.depends_on for read, user in zip(reads, users))
    assert reads[2].depends_on == ((users[0].lane, users[0].order),), "a slot waits for its user"
    writes = [step for step in first if step.kind is StepKind.WRITE_KV]
    assert [step.bytes for step in writes] == [13] * 3
    kinds = {step.lane: step for step in first if step.kind in (StepKind.OFFLOAD_QUERY, StepKind.SAVE_KV)}
    assert ({Lane.D2H} if on_device else {Lane.CPU}) == {step.depends_on[0][0] for step in writes}
    assert bool(kinds) == on_device
    (logits,) = [step for step in first if step.kind is StepKind.LOGITS]
    assert (Lane.DISK_WRITE, writes[-1].order) in logits.depends_on, "a pass ends when its rows are on disk"
    again = [step for step in scheduler.pass_steps(PassShape(1, 3, 3, parts, False)) if step.kind is StepKind.READ_KV]
    assert all((Lane.DISK_WRITE, write.order) in read.depends_on for read, write in zip(again, writes))


def test_flops_and_bytes_of_the_steps():
    scheduler = Scheduler(make_units(1, [(0, 0)] * 3, False), WORK, 1, compute_lane=Lane.CPU, host_ring_bytes=0)
    steps = scheduler.pass_steps(PassShape(0, 6, 2, (MicroBatchShape(0, 6, 9, 30, Tier.CPU, Lane.CPU),), False))
    flops = {step.kind: step.flops for step in steps}
    assert flops[StepKind.ATTENTION_INPUTS] == 6 * 2
    assert flops[StepKind.ATTEND] == 30 * 3
    assert flops[StepKind.ATTENTION_OUTPUT] == 6 * 5
    assert (flops[StepKind.MLP], flops[StepKind.LOGITS]) == (6 * 7, 2 * 11)
    assert next(step.bytes for step in steps if step.kind is StepKind.ATTEND) == 9 * 13
