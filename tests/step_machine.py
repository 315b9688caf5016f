"""A small machine that runs schedules in a random order, and checks that no byte is overwritten while it is needed.

Lanes start their steps in order (weights in an order of their own), in any interleaving, the disk lanes several at
once, as their threads do; a pass is emitted when the compute of the last one is done.
"""

from __future__ import annotations

import bisect
import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass

from flexrun.core import Lane, Tier
from flexrun.schedule import Scheduler
from flexrun.steps import ATTENDS, STREAMING, KVBytes, ModelWork, PassShape, Step, StepKind, WeightUnit

WORK = ModelWork(2, 3, 5, (7,) * 8, 11, KVBytes(13, 13), 17, 19, 23, 29.0, 1.0, 31, 37, 41)
DISK_STEPS_UNDER_WAY = 3
HOST, DEVICE = "host ring", "device ring"
COMPUTE_WITH_WEIGHTS = (
    StepKind.ATTENTION_INPUTS,
    StepKind.ATTENTION_OUTPUT,
    StepKind.MLP,
    StepKind.EXPERTS,
    StepKind.LOGITS,
)
FEEDS = {  # whose rows a step needs, of its own layer
    **dict.fromkeys((*ATTENDS, StepKind.SAVE_KV, StepKind.OFFLOAD_QUERY), (StepKind.ATTENTION_INPUTS,)),
    StepKind.MERGE: (*ATTENDS, StepKind.RETURN_ATTENDED),
    StepKind.ATTENTION_OUTPUT: (*ATTENDS, StepKind.RETURN_ATTENDED, StepKind.MERGE),
    StepKind.MLP: (StepKind.ATTENTION_OUTPUT,),
    StepKind.EXPERTS: (StepKind.MLP,),
    StepKind.OFFLOAD_NORMED: (StepKind.MLP,),
    **dict.fromkeys((StepKind.SAVE_HIDDEN, StepKind.KEEP_SAMPLED), (StepKind.MLP, StepKind.EXPERTS)),
}
HIDDEN = (  # steps that read or write the hidden rows on the device
    StepKind.EMBED,
    StepKind.LOAD_HIDDEN,
    StepKind.ATTENTION_INPUTS,
    StepKind.MLP,
    StepKind.EXPERTS,
    StepKind.SAVE_HIDDEN,
    StepKind.KEEP_SAMPLED,
)


@dataclass
class Load:
    """A unit's bytes in a ring, and how many steps have used them."""

    start: int
    end: int
    written: bool = False
    uses: int = 0


@dataclass
class HostSlot:
    """A staging slot of the host: whose KV it holds, whether rows are still being read into it, and who needs it."""

    key: tuple[int, int, int]  # pass, layer, micro-batch
    users_left: set[StepKind]
    read_under_way: bool = False


class Machine:
    """Runs steps in a random order that lanes and dependencies allow, and checks what each one touches."""

    def __init__(self, scheduler: Scheduler, units: list[WeightUnit], rings: dict[str, int], chooser: random.Random):
        self.scheduler, self.units, self.rings, self.chooser = scheduler, units, rings, chooser
        self.pace = {lane: chooser.choice((1.0, 1.0, 0.001)) for lane in Lane}  # a slow lane brings races to light
        self.compute_ring = DEVICE if scheduler.on_device else HOST
        self.queues: dict[tuple[Lane, bool], deque[Step]] = defaultdict(deque)  # weights have an order of their own
        self.under_way: list[Step] = []
        self.ended: dict[Lane, set[int]] = defaultdict(set)
        self.emitted: Counter = Counter()
        self.turns: dict[Step, int] = {}  # which of a unit's loads a step makes or uses: one a pass
        self.started: Counter = Counter()
        self.live: dict[str, dict[tuple[int, int], Load]] = {HOST: {}, DEVICE: {}}
        self.slots: dict[int, Step] = {}
        self.host_slots: dict[int, HostSlot] = {}  # slots in use
        self.homes: dict[int, Tier] = {}  # of each micro-batch
        self.lanes: dict[int, Lane] = {}  # that attends it, but for what it has on the device
        self.parts: dict[int, int] = {}  # into how many each pass is cut

    def run_pass(self, shape: PassShape) -> list[Step]:
        pending = [step for step in self._unfinished() if step.kind not in STREAMING]
        assert not pending, f"a pass begins, and replaces the rows that these still need: {pending}"
        assert not self.slots and not self.host_slots, "a pass begins while staging slots are in use"
        self.homes |= {micro_batch.index: micro_batch.home for micro_batch in shape.micro_batches}
        self.lanes |= {micro_batch.index: micro_batch.attend_lane for micro_batch in shape.micro_batches}
        steps = self.scheduler.pass_steps(shape)
        inputs = [step for step in steps if step.kind is StepKind.ATTENTION_INPUTS and step.layer == 0]
        self.parts[shape.index] = len(inputs)
        for step in steps:
            assert step.order == self.emitted[step.lane], "orders count the steps of a lane"
            for lane, order in step.depends_on:
                assert order < self.emitted[lane], f"{step} depends on a step that is not emitted yet"
            self.emitted[step.lane] += 1
            self.queues[step.lane, step.kind in STREAMING].append(step)
        compute = self.scheduler.compute_lane
        while len(self.ended[compute]) < self.emitted[compute]:
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
        limit = DISK_STEPS_UNDER_WAY if step.lane in (Lane.DISK_READ, Lane.DISK_WRITE) else 1
        queue = step.lane, step.kind in STREAMING
        free = sum((other.lane, other.kind in STREAMING) == queue for other in self.under_way) < limit
        return free and all(order in self.ended[lane] for lane, order in step.depends_on)

    def _start(self, step: Step) -> None:
        self.turns[step] = self._turn(step)
        self.queues[step.lane, step.kind in STREAMING].popleft()
        unit = self.units[step.unit]
        moved_bytes = unit.disk_bytes + unit.host_bytes
        if step.kind is StepKind.READ_WEIGHTS:
            self._fill(HOST, step, unit.disk_bytes)
        elif step.kind is StepKind.COPY_WEIGHTS:
            if unit.disk_bytes:
                self._check_there(HOST, step, step.source_offset, unit.disk_bytes)
            self._fill(DEVICE, step, moved_bytes)
        elif step.kind in COMPUTE_WITH_WEIGHTS and step.unit >= 0 and moved_bytes:
            self._check_there(self.compute_ring, step, step.offset, moved_bytes)
        elif step.kind is StepKind.READ_KV:
            self._host_slot(step, step.offset).read_under_way = True
            assert not [other for other in self._unfinished() if self._saves_for(other, step)]
        elif step.kind is StepKind.LOAD_KV:
            assert step.offset not in self.slots, "a staging slot is filled while it is in use"
            self.slots[step.offset] = step
            assert not [other for other in self._unfinished() if self._saves_for(other, step)]
        elif step.kind is StepKind.ATTEND and self._load_of(step):
            assert self._load_of(step) not in self.under_way, "KV is attended before it has arrived"
        elif step.kind is StepKind.ATTEND and self._comes_to_a_slot(step):
            assert step.offset not in self.slots, "new rows are put into a staging slot that is in use"
        if self.homes.get(step.micro_batch) is Tier.DISK and (slot := self._host_slot_of(step)) is not None:
            assert not self._host_slot(step, slot).read_under_way, "a slot is used before its rows have been read"
            if step.kind is StepKind.WRITE_KV:
                late = [other for other in self._unfinished() if self._makes_rows_of(other, step)]
                assert not late, f"rows are written before {late} has made them"
        if step.kind in (StepKind.EMBED, StepKind.LOAD_HIDDEN):
            late = [
                other for other in self._unfinished() if other.kind in HIDDEN and self._leaves_place_to(other, step)
            ]
            assert not late, f"{step} overwrites hidden rows that {late} still needs"
        if step.kind is StepKind.ATTENTION_INPUTS:
            late = [other for other in self._unfinished() if self._reads_rows_before(other, step)]
            assert not late, f"{step} overwrites rows that {late} still needs"
        if step.kind in (StepKind.MLP, StepKind.OFFLOAD_NORMED):
            late = [other for other in self._unfinished() if self._reads_normed_before(other, step)]
            assert not late, f"{step} overwrites rows that {late} still needs"
        late = [other for other in self._unfinished() if self._feeds(other, step)]
        assert not late, f"{step} starts before {late}"
        self.under_way.append(step)

    def _end(self, step: Step) -> None:
        self.under_way.remove(step)
        self.ended[step.lane].add(step.order)
        key = self.turns[step], step.unit
        if step.kind is StepKind.READ_WEIGHTS:
            self.live[HOST][key].written = True
        elif step.kind is StepKind.COPY_WEIGHTS:
            self.live[DEVICE][key].written = True
            if self.units[step.unit].disk_bytes:
                self.live[HOST][key].uses += 1
        elif step.kind in COMPUTE_WITH_WEIGHTS and key in self.live[self.compute_ring]:
            self.live[self.compute_ring][key].uses += 1
        elif step.kind is StepKind.ATTEND and self._load_of(step):
            del self.slots[step.offset]
        if step.kind is StepKind.READ_KV:
            self.host_slots[step.offset].read_under_way = False
        elif self.homes.get(step.micro_batch) is Tier.DISK and (slot := self._host_slot_of(step)) is not None:
            self.host_slots[slot].users_left.discard(step.kind)
            if not self.host_slots[slot].users_left:
                del self.host_slots[slot]

    def _turn(self, step: Step) -> int:
        """Which of a unit's loads a step makes or uses: there is one a pass."""
        if step.kind not in STREAMING:
            return step.pass_index
        self.started[step.kind, step.unit] += 1
        return self.started[step.kind, step.unit] - 1

    def _uses_of(self, ring: str, turn: int, unit: int) -> int:
        """How many steps use a unit's load before its room may be taken."""
        if ring == HOST and self.scheduler.on_device:
            return 1
        module = self.units[unit].module
        return {"attention": 2, "head": 1}.get(module, 1) * (1 if module == "head" else self.parts.get(turn, 1))

    def _fill(self, ring: str, step: Step, nbytes: int) -> None:
        start, end = step.offset, step.offset + nbytes
        assert 0 <= start < end <= self.rings[ring]
        for other, load in list(self.live[ring].items()):
            if load.start < end and start < load.end:
                assert load.uses == self._uses_of(ring, *other), (
                    f"{step} overwrites {other}, still needed, in the {ring}"
                )
                del self.live[ring][other]
        self.live[ring][self.turns[step], step.unit] = Load(start, end)

    def _check_there(self, ring: str, step: Step, offset: int, nbytes: int) -> None:
        load = self.live[ring].get((self.turns[step], step.unit))
        assert load is not None, f"{step} uses a unit that was never loaded, or is overwritten already"
        assert (load.start, load.end) == (offset, offset + nbytes), "a step looks at another place than was filled"
        assert load.written, f"{step} starts before its weights have arrived"

    def _comes_to_a_slot(self, attend: Step) -> bool:
        """Whether the KV of a step that attends is brought to the device for it."""
        here = attend.lane is Lane.GPU and self.lanes[attend.micro_batch] is Lane.GPU
        return here and self.homes[attend.micro_batch] is not Tier.GPU

    def _host_slot_of(self, step: Step) -> int | None:
        """The host slot that a step of disk-resident KV uses, READ_KV apart."""
        if step.kind in (StepKind.OFFLOAD_QUERY, StepKind.SAVE_KV, StepKind.WRITE_KV):
            return step.offset
        if step.kind is StepKind.LOAD_KV:
            return step.source_offset
        return step.offset if step.kind is StepKind.ATTEND and step.lane is Lane.CPU else None

    def _host_slot(self, step: Step, number: int) -> HostSlot:
        """The slot, which is ``step``'s own or free to be."""
        key = (step.pass_index, step.layer, step.micro_batch)
        if number not in self.host_slots:
            unfinished = [step, *self._unfinished()]
            users = {other.kind for other in unfinished if _same_kv(other, step) and self._uses_host_slot(other)}
            self.host_slots[number] = HostSlot(key, users)
        assert self.host_slots[number].key == key, "a staging slot of the host is used for two micro-batches"
        return self.host_slots[number]

    @staticmethod
    def _uses_host_slot(step: Step) -> bool:
        """Whether a step of disk-resident KV reads its slot: to copy on, to attend, to write out."""
        on_cpu = step.kind is StepKind.ATTEND and step.lane is Lane.CPU
        return on_cpu or step.kind in (StepKind.LOAD_KV, StepKind.WRITE_KV)

    def _load_of(self, attend: Step) -> Step | None:
        load = self.slots.get(attend.offset)
        same = load and (load.layer, load.micro_batch) == (attend.layer, attend.micro_batch)
        return load if same and attend.lane is Lane.GPU else None

    @staticmethod
    def _saves_for(other: Step, load: Step) -> bool:
        """Whether ``other`` writes the rows, on the host or on disk, that ``load`` is about to read."""
        same = (other.layer, other.micro_batch) == (load.layer, load.micro_batch)
        return other.kind in (StepKind.SAVE_KV, StepKind.WRITE_KV) and same and other.pass_index < load.pass_index

    def _makes_rows_of(self, other: Step, write: Step) -> bool:
        """Whether ``other`` puts the rows into the slot that ``write`` writes out."""
        makers = (StepKind.OFFLOAD_QUERY, StepKind.SAVE_KV) if self.scheduler.on_device else (StepKind.ATTEND,)
        if self.scheduler.work.kv.record and other.kind is StepKind.ATTEND and other.lane is Lane.CPU:
            makers = (StepKind.ATTEND,)  # who attends compresses
        return other.kind in makers and _same_kv(other, write)

    def _part_of(self, step: Step) -> int:
        return bisect.bisect_right(self.scheduler.part_starts, step.start) - 1

    def _leaves_place_to(self, other: Step, step: Step) -> bool:
        """Whether ``other`` works on a part of this pass that was on the device where the part of ``step`` will be."""
        if step.pass_index != other.pass_index or len(self.scheduler.part_starts) < 2:
            return False
        mine, others = self._part_of(step), self._part_of(other)
        return (max(other.layer, 0), others) < (max(step.layer, 0), mine) and others % 2 == mine % 2

    def _reads_rows_before(self, other: Step, inputs: Step) -> bool:
        """Whether ``other`` reads the q, k, v rows of an earlier layer or pass, which ``inputs`` overwrites."""
        reads = other.kind in (StepKind.SAVE_KV, StepKind.OFFLOAD_QUERY, *ATTENDS)
        if reads and self._leaves_place_to(other, inputs):
            return True
        earlier = (other.pass_index, other.layer) < (inputs.pass_index, inputs.layer)
        return reads and earlier and (_same_rows(other, inputs) or other.pass_index < inputs.pass_index)

    @staticmethod
    def _reads_normed_before(other: Step, step: Step) -> bool:
        """Whether ``other`` runs experts on the CPU, or moves their rows, for an earlier layer or pass."""
        on_cpu = other.kind is StepKind.EXPERTS and other.lane is Lane.CPU and step.lane is not Lane.CPU
        brings = on_cpu or other.kind in (StepKind.OFFLOAD_NORMED, StepKind.RETURN_ROUTED)
        earlier = (other.pass_index, other.layer) < (step.pass_index, step.layer)
        return brings and earlier and (_same_rows(other, step) or other.pass_index < step.pass_index)

    @staticmethod
    def _feeds(other: Step, step: Step) -> bool:
        """Whether ``step`` needs rows that ``other`` makes."""
        if step.kind is StepKind.LOGITS:
            return other.kind in (StepKind.MLP, StepKind.EXPERTS, StepKind.RETURN_ROUTED, StepKind.KEEP_SAMPLED)
        if step.kind is StepKind.LOAD_HIDDEN:
            return other.kind is StepKind.SAVE_HIDDEN and other.layer == step.layer - 1 and _same_rows(other, step)
        if step.kind is StepKind.ATTENTION_INPUTS and other.kind is StepKind.LOAD_HIDDEN:
            return other.layer == step.layer and _same_rows(other, step)
        makes_hidden = StepKind.EMBED, StepKind.MLP, StepKind.EXPERTS, StepKind.RETURN_ROUTED
        if step.kind is StepKind.ATTENTION_INPUTS and other.kind in makes_hidden:
            return other.layer < step.layer and _same_rows(other, step)
        kinds = FEEDS.get(step.kind, ())
        if step.kind is StepKind.ATTEND and step.lane is Lane.CPU:
            kinds = (*kinds, StepKind.OFFLOAD_QUERY)
        if step.kind is StepKind.EXPERTS and step.lane is Lane.CPU:
            kinds = (*kinds, StepKind.OFFLOAD_NORMED)
        if step.kind is StepKind.RETURN_ROUTED:
            same = (other.pass_index, other.layer) == (step.pass_index, step.layer) and _same_rows(other, step)
            return other.kind is StepKind.EXPERTS and other.lane is Lane.CPU and same
        if step.kind is StepKind.RETURN_ATTENDED:
            return other.kind is StepKind.ATTEND and other.lane is Lane.CPU and _same_kv(other, step)
        return other.kind in kinds and other.layer == step.layer and _same_rows(other, step)


def _same_rows(step: Step, other: Step) -> bool:
    return step.start < other.stop and other.start < step.stop


def _same_kv(step: Step, other: Step) -> bool:
    """Whether two steps are about the same rows: those of a layer and, where one names it, of a micro-batch."""
    same = -1 in (step.micro_batch, other.micro_batch) or step.micro_batch == other.micro_batch
    return same and (step.pass_index, step.layer) == (other.pass_index, other.layer)


def unit_keys(layers: int, groups: int = 0) -> list[tuple[int, str]]:
    """groups: of routed experts in each odd layer."""
    experts = [f"experts.{group}" for group in range(groups)]
    keys = [(layer, module) for layer in range(layers) for module in ("attention", "mlp", *experts * (layer % 2))]
    return [*keys, (layers, "head")]


def make_units(
    layers: int, sizes: list[tuple[int, int]], on_device: bool, groups: int = 0, cpu_experts: int = 0
) -> list[WeightUnit]:
    """Of each group's two experts the CPU runs ``cpu_experts`` beside a device."""
    counts = {True: (2, cpu_experts if on_device else 0), False: (0, 0)}
    return [
        WeightUnit(index, layer, module, disk, host if on_device else 0, *counts[module.startswith("experts")])
        for index, ((layer, module), (disk, host)) in enumerate(zip(unit_keys(layers, groups), sizes, strict=True))
    ]
