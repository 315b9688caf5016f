"""Attention of one micro-batch as steps: which rows go where, what is copied for them, and what comes back.

KV lives where its micro-batch has its home. Attention runs on the compute lane, over slabs in place or over copies in
staging slots, or on the CPU beside a device. Prompts that start in a pass need no KV from anywhere, so a device attends
them itself, straight from the rows that it has just computed.

Of a micro-batch on the host the newest tokens may live on the device. Both attend their part at the same time, and the
device merges what they found. Until a sequence is longer than its part on the host, nothing of this shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flexrun.core import Lane, Tier
from flexrun.steps import Dependency, MicroBatchShape, ModelWork, StepKind


class _Slots:
    """Staging slots taken in turn, and the last steps that use each; None while those are not emitted yet."""

    def __init__(self, count: int):
        self.users: list[tuple[Dependency, ...] | None] = [()] * count
        self.following = 0

    @property
    def free(self) -> bool:
        """Whether the next slot can be taken."""
        return self.users[self.following] is not None

    def take(self) -> tuple[int, tuple[Dependency, ...]]:
        """(slot, steps that must finish before it is filled). Its users are to be set before it is taken again."""
        slot = self.following
        self.following = (slot + 1) % len(self.users)
        waits, self.users[slot] = self.users[slot], None
        return slot, waits


@dataclass
class Part:
    """Micro-batches that go through the layers together, each with its first row; half of a pass, or all of it.

    Of a pass larger than the device, one of more: ``place`` says in which of two places its rows come to the device.
    """

    micro_batches: list[tuple[MicroBatchShape, int]]
    start: int
    stop: int
    stage: int = 0  # the next one
    inputs: Dependency | None = None  # q, k and v of the layer at hand
    attended: list[Dependency] = field(default_factory=list)  # what its output waits for
    returned: list[tuple[Dependency, dict]] = field(default_factory=list)  # to be merged with what the device found
    sharing: list[tuple[MicroBatchShape, dict]] = field(default_factory=list)  # to be joined with prefixes
    busy: list[Dependency] = field(default_factory=list)  # host-bound copies that still read its q, k, v rows
    place: int = 0
    loaded: list[Dependency] = field(default_factory=list)  # its hidden rows are on the device
    saved: list[Dependency] = field(default_factory=list)  # they are on the host
    routed: list[Dependency] = field(default_factory=list)  # what experts on the CPU made of its rows is on the device


@dataclass(frozen=True)
class _Staged:
    """KV on its way to a staging slot of the device. source: steps before the slot of the host takes new rows."""

    loaded: tuple[Dependency, ...]
    slot: int
    host_slot: int
    source: tuple[Dependency, ...]


class AttentionSteps:
    """Emits the steps around attention, micro-batch by micro-batch.

    emit(kind, lane, depends_on, **fields) adds a step to the pass at hand. kv_slots, host_kv_slots: see Scheduler.
    """

    def __init__(
        self, work: ModelWork, emit: Callable[..., Dependency], compute_lane: Lane, kv_slots: int, host_kv_slots: int
    ):
        self._work, self._emit, self._compute_lane = work, emit, compute_lane
        self._on_device = compute_lane is Lane.GPU
        self._device_slots, self._host_slots = _Slots(kv_slots), _Slots(host_kv_slots)
        self._kv_saved: dict[tuple[int, int], Dependency] = {}  # (layer, micro-batch) -> its newest rows are home
        self._kv_saving: dict[tuple[int, int], Dependency] = {}  # the same for the pass at hand
        self._staged: dict[tuple[int, int], _Staged] = {}  # (layer, micro-batch) -> loaded ahead
        self._returning: dict[tuple[int, int], Dependency] = {}  # (layer, micro-batch) -> attended on the CPU

    def begin(self) -> None:
        """Another pass: what the last one saved is what this one loads."""
        self._kv_saved.update(self._kv_saving)
        self._kv_saving.clear()

    @property
    def unwritten(self) -> list[Dependency]:
        """Writes to disk that may be under way: each one earlier was over before its slot was taken again."""
        return [user for users in self._host_slots.users for user in users or () if user[0] is Lane.DISK_WRITE]

    def _in_place(self, micro_batch: MicroBatchShape) -> bool:
        return micro_batch.home is (Tier.GPU if self._on_device else Tier.CPU)

    def _is_staged(self, micro_batch: MicroBatchShape) -> bool:
        """Whether KV comes to the device to be attended; fresh rows alone need none."""
        away = self._on_device and micro_batch.home is not Tier.GPU and micro_batch.attend_lane is Lane.GPU
        return away and micro_batch.query_tokens > micro_batch.fresh_tokens

    def send(self, part: Part, layer: int, micro_batch: MicroBatchShape, start: int) -> None:
        """What a micro-batch's new rows set going off the device: their way home, and attention on the CPU."""
        if not self._on_device or micro_batch.home is Tier.GPU:
            return
        on_disk = micro_batch.home is Tier.DISK
        if self._is_staged(micro_batch):
            if not on_disk:
                self._save(part, layer, micro_batch, start, 0, ())
            return
        cached, below = micro_batch.cached, micro_batch.below
        slot, source = self._read_to_host(layer, micro_batch) if on_disk else (0, ())
        if not below.query_tokens:
            self._save(part, layer, micro_batch, start, slot, source)
            return
        where = {"layer": layer, "micro_batch": micro_batch.index, "start": start}
        down = self._emit(
            StepKind.OFFLOAD_QUERY,
            Lane.D2H,
            (part.inputs, *source),
            stop=start + micro_batch.query_tokens,
            offset=slot,
            bytes=cached.query_tokens * self._work.query_bytes_per_token + self._leaving_bytes(micro_batch),
            **where,
        )
        part.busy.append(down)
        where["stop"] = start + cached.query_tokens
        done = self._attend(StepKind.ATTEND, Lane.CPU, (down,), below, slot, where)
        self._returning[layer, micro_batch.index] = done
        if on_disk:
            stored = done if self._work.kv.record else down  # who attends a compressed cache also takes its rows in
            self._host_slots.users[slot] = (done, *self._write_back(layer, micro_batch, stored, slot))

    def receive(self, part: Part, layer: int, micro_batch: MicroBatchShape, start: int) -> None:
        """Attention on the compute lane that needs no copy, and what comes back from the CPU."""
        tokens, fresh = micro_batch.query_tokens, micro_batch.fresh_tokens
        where = {"layer": layer, "micro_batch": micro_batch.index, "start": start, "stop": start + tokens}
        if self._in_place(micro_batch):
            attended = self._attend(StepKind.ATTEND, self._compute_lane, (part.inputs,), micro_batch, 0, where)
            part.attended.append(attended)
            if micro_batch.prefix_rows:
                part.sharing.append((micro_batch, where))
            return
        if micro_batch.prefix_rows:
            part.sharing.append((micro_batch, where))
        if not self._on_device:  # on disk; the step that attends also stores the new rows
            slot, source = self._read_to_host(layer, micro_batch)
            attended = self._attend(
                StepKind.ATTEND, self._compute_lane, (part.inputs, *source), micro_batch, slot, where
            )
            self._host_slots.users[slot] = self._write_back(layer, micro_batch, attended, slot) or (attended,)
            part.attended.append(attended)
            return
        cached_stop = start + tokens - fresh
        if fresh:
            rows = {**where, "start": cached_stop}
            part.attended.append(
                self._attend(StepKind.ATTEND_FRESH, self._compute_lane, (part.inputs,), micro_batch.fresh, 0, rows)
            )
        above, rows = micro_batch.above, {**where, "stop": cached_stop}
        if above.query_tokens:
            part.attended.append(self._attend(StepKind.ATTEND, self._compute_lane, (part.inputs,), above, 0, rows))
        done = self._returning.pop((layer, micro_batch.index), None)
        if done is not None:
            merges = above.query_tokens > 0
            joins = merges or micro_batch.prefix_rows > 0
            a_row = self._work.query_bytes_per_token + joins * self._work.lse_bytes_per_token
            back = self._emit(StepKind.RETURN_ATTENDED, Lane.H2D, (done,), bytes=(tokens - fresh) * a_row, **rows)
            if merges:
                part.returned.append((back, rows))
            else:
                part.attended.append(back)

    def merge(self, part: Part) -> None:
        """Last, when the compute lane has attended all it can without the CPU: join what both found, and then what is
        in prefixes that sequences share."""
        for back, rows in part.returned:
            part.attended.append(self._emit(StepKind.MERGE, self._compute_lane, (back,), **rows))
        part.returned.clear()
        for micro_batch, where in part.sharing:
            part.attended.append(self._attend_prefix(tuple(part.attended), micro_batch, where))
        part.sharing.clear()

    def attend_staged(self, part: Part, layer: int, micro_batch: MicroBatchShape, start: int) -> None:
        """Attention on the device over KV from elsewhere."""
        if not self._is_staged(micro_batch):
            return
        cached = micro_batch.cached
        staged = self._staged.pop((layer, micro_batch.index), None) or self._load_kv(layer, micro_batch)
        where = {"layer": layer, "micro_batch": micro_batch.index, "start": start, "stop": start + cached.query_tokens}
        attended = self._attend(
            StepKind.ATTEND, self._compute_lane, (part.inputs, *staged.loaded), cached, staged.slot, where
        )
        part.attended.append(attended)
        self._device_slots.users[staged.slot] = (attended,)
        if micro_batch.home is Tier.DISK:
            self._save(part, layer, micro_batch, start, staged.host_slot, staged.source, staged.loaded)

    def _attend(
        self,
        kind: StepKind,
        lane: Lane,
        depends_on: tuple[Dependency, ...],
        rows: MicroBatchShape,
        slot: int,
        where: dict,
    ) -> Dependency:
        return self._emit(
            kind,
            lane,
            depends_on,
            offset=slot,
            bytes=rows.kv_tokens * self._work.kv.token,
            flops=rows.query_kv_pairs * self._work.attend_flops_per_pair,
            **where,
        )

    def _attend_prefix(self, attended: tuple[Dependency, ...], micro_batch: MicroBatchShape, where: dict) -> Dependency:
        return self._emit(
            StepKind.ATTEND_PREFIX,
            self._compute_lane,
            attended,
            bytes=micro_batch.prefix_kv_tokens * self._work.kv.row,
            flops=micro_batch.prefix_pairs * self._work.attend_flops_per_pair,
            **where,
        )

    # KV cache -----------------------------------------------------------------------------------------

    def _there_bytes(self, micro_batch: MicroBatchShape) -> int:
        """What earlier passes left of its KV."""
        return self._work.kv.there(micro_batch.query_tokens, micro_batch.kv_tokens, micro_batch.there_groups)

    def _leaving_bytes(self, micro_batch: MicroBatchShape) -> int:
        """What leaves the device of its new rows."""
        tokens, kv = micro_batch.query_tokens - micro_batch.above_new_tokens, self._work.kv
        if micro_batch.attend_lane is Lane.CPU:
            return kv.to_host(tokens, micro_batch.fresh_groups)
        return kv.added(tokens, micro_batch.new_groups)

    def load_ahead(self, part: Part, layer: int) -> None:
        """Fill the device's staging slots for the attention that comes next, before anything that must come back from
        the CPU takes its turn on the link."""
        for micro_batch, _ in part.micro_batches:
            if self._is_staged(micro_batch) and self._device_slots.free and self._host_slots.free:
                self._staged[layer, micro_batch.index] = self._load_kv(layer, micro_batch)

    def _load_kv(self, layer: int, micro_batch: MicroBatchShape) -> _Staged:
        """Emit what brings a micro-batch's KV to a staging slot of the device."""
        host_slot, source = self._read_to_host(layer, micro_batch) if micro_batch.home is Tier.DISK else (0, ())
        slot, waits = self._device_slots.take()
        nbytes = self._there_bytes(micro_batch)
        if not nbytes:
            return _Staged((), slot, host_slot, source)
        saved = self._kv_saved.get((layer, micro_batch.index))
        load = self._emit(
            StepKind.LOAD_KV,
            Lane.H2D,
            (*waits, *source, *((saved,) if saved else ())),
            layer=layer,
            micro_batch=micro_batch.index,
            offset=slot,
            source_offset=host_slot,
            bytes=nbytes,
        )
        return _Staged((load,), slot, host_slot, source)

    def _read_to_host(self, layer: int, micro_batch: MicroBatchShape) -> tuple[int, tuple[Dependency, ...]]:
        """A staging slot of the host, filled with what is on disk; and what must be over before new rows go in."""
        slot, waits = self._host_slots.take()
        saved, nbytes = self._kv_saved.get((layer, micro_batch.index)), self._there_bytes(micro_batch)
        waits += (saved,) if saved else ()
        if not nbytes:
            return slot, waits
        where = {"layer": layer, "micro_batch": micro_batch.index, "offset": slot}
        return slot, (self._emit(StepKind.READ_KV, Lane.DISK_READ, waits, bytes=nbytes, **where),)

    def _save(
        self,
        part: Part,
        layer: int,
        micro_batch: MicroBatchShape,
        start: int,
        slot: int,
        source: tuple[Dependency, ...],
        readers: tuple[Dependency, ...] = (),
    ) -> None:
        """Emit the way home of all new rows, if some go. readers: steps that read the host's slot besides."""
        nbytes, on_disk = self._leaving_bytes(micro_batch), micro_batch.home is Tier.DISK
        if not nbytes:
            if on_disk:
                self._host_slots.users[slot] = (*readers, *source)
            return
        saved = self._emit(
            StepKind.SAVE_KV,
            Lane.D2H,
            (part.inputs, *source),
            layer=layer,
            micro_batch=micro_batch.index,
            start=start,
            stop=start + micro_batch.query_tokens,
            offset=slot,
            bytes=nbytes,
        )
        part.busy.append(saved)
        if on_disk:
            written = self._write_back(layer, micro_batch, saved, slot)
            self._host_slots.users[slot] = (*readers, *(written or (saved,)))
        else:
            self._kv_saving[layer, micro_batch.index] = saved

    def _write_back(
        self, layer: int, micro_batch: MicroBatchShape, stored: Dependency, slot: int
    ) -> tuple[Dependency, ...]:
        """Emit the write, if there is one, of new rows out of a host slot, once ``stored`` has put them there."""
        nbytes = self._work.kv.added(micro_batch.query_tokens, micro_batch.new_groups)
        if not nbytes:
            return ()
        self._kv_saving[layer, micro_batch.index] = written = self._emit(
            StepKind.WRITE_KV,
            Lane.DISK_WRITE,
            (stored,),
            layer=layer,
            micro_batch=micro_batch.index,
            offset=slot,
            bytes=nbytes,
        )
        return (written,)
