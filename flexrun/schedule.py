"""One pass through the layers as data: the steps that the executor runs, the simulator times and the report draws.

A step depends only on steps emitted before it, and each lane runs its steps in the order of emission,
so any list this module emits runs to its end. Overlap is a property of the steps: weights are read as far
ahead as the ring that receives them has room, also across the border between two passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from flexrun.core import Lane, Tier
from flexrun.errors import BudgetError
from flexrun.steps import Dependency, MicroBatchShape, ModelWork, PassShape, Step, StepKind, WeightUnit


class Ring:
    """Byte ring whose regions are taken and released in order; decides offsets before any byte moves."""

    def __init__(self, capacity_bytes: int):
        self.capacity_bytes = capacity_bytes
        self._head = 0
        self._regions: deque[list] = deque()  # [start, end, consumer or None], oldest first

    def take(self, size_bytes: int) -> tuple[int, list, tuple[Dependency, ...]] | None:
        """(offset, region, steps that must finish first), or None while the room is still in use."""
        if size_bytes > self.capacity_bytes:
            raise BudgetError(
                f"a weight unit of {size_bytes} bytes does not fit the streaming buffer of {self.capacity_bytes}",
                "raise --cpu-memory (or --gpu-memory), or place more weights on a resident tier",
            )
        wraps = self._head + size_bytes > self.capacity_bytes
        start = 0 if wraps else self._head
        end = start + size_bytes
        reclaimed = 0
        for region_start, region_end, consumer in self._regions:
            overlaps = region_start < end and start < region_end
            skipped = wraps and region_start >= self._head
            if not (overlaps or skipped):
                break
            if consumer is None:
                return None
            reclaimed += 1
        dependencies = tuple(self._regions.popleft()[2] for _ in range(reclaimed))
        region = [start, end, None]
        self._regions.append(region)
        self._head = end
        return start, region, dependencies

    @staticmethod
    def release(region: list, consumer: Dependency) -> None:
        region[2] = consumer


@dataclass
class _Loaded:
    """A unit on its way to the compute device: what to wait for, and where its bytes will be."""

    ready: tuple[Dependency, ...] = ()
    host_offset: int = 0
    device_offset: int = 0
    host_region: list | None = None
    device_region: list | None = None


class _Slots:
    """Staging slots taken in turn, and the last steps that use each."""

    def __init__(self, count: int):
        self.users: list[tuple[Dependency, ...]] = [()] * count
        self.following = 0


class Scheduler:
    """Emits the steps of one pass after another.

    units: every weight unit in the order of use: for each layer "attention", "mlp", then groups of routed experts
    (any other name); last "head".
    compute_lane: Lane.GPU when weights are copied to a device, Lane.CPU when host tensors are used in place.
    read_embedding_rows: the token embedding lives on disk and is gathered row by row.
    kv_slots: staging slots on the device for host-resident KV attended there, and on the host for KV from disk.
    """

    def __init__(
        self,
        units: Sequence[WeightUnit],
        work: ModelWork,
        num_layers: int,
        *,
        compute_lane: Lane,
        host_ring_bytes: int,
        device_ring_bytes: int = 0,
        read_embedding_rows: bool = False,
        kv_slots: int = 2,
    ):
        self.units = {(unit.layer, unit.module): unit for unit in units}
        self._later_modules: dict[int, list[str]] = {}  # of each layer, what runs after its attention
        for unit in units:
            if unit.module not in ("attention", "head"):
                self._later_modules.setdefault(unit.layer, []).append(unit.module)
        self.work = work
        self.num_layers = num_layers
        self.compute_lane = compute_lane
        self.on_device = compute_lane is Lane.GPU
        self.read_embedding_rows = read_embedding_rows
        self._host_ring = Ring(host_ring_bytes)
        self._device_ring = Ring(device_ring_bytes)
        self._read_units = [unit for unit in units if unit.disk_bytes]
        self._copy_units = [unit for unit in units if self.on_device and unit.disk_bytes + unit.host_bytes]
        self._loaded: dict[tuple[int, int], _Loaded] = {}  # (pass, unit) -> loads emitted, not yet consumed
        self._read_cursor = 0  # counts units over all passes
        self._copy_cursor = 0
        self._orders = dict.fromkeys(Lane, 0)
        self._device_slots, self._host_slots = _Slots(kv_slots), _Slots(kv_slots)
        self._kv_saved: dict[tuple[int, int], Dependency] = {}  # (layer, micro-batch) -> its newest rows are home
        self._last_write: Dependency | None = None  # of KV to disk in this pass
        self._steps: list[Step] = []
        self._shape: PassShape | None = None

    def pass_steps(self, shape: PassShape) -> list[Step]:
        """All steps of one pass, in an order in which every dependency comes before its dependents."""
        self._steps = []
        self._shape = shape
        self._last_write = None
        work, tokens = self.work, shape.tokens
        self._load_ahead()
        rows = ()
        if self.read_embedding_rows:
            rows = (self._emit(StepKind.READ_ROWS, Lane.DISK_READ, bytes=tokens * work.embedding_row_bytes),)
        self._emit(StepKind.EMBED, self.compute_lane, rows, bytes=tokens * work.hidden_bytes_per_token)
        busy_buffers: list[Dependency] = []  # host-bound copies that still read this layer's q, k, v rows
        for layer in range(self.num_layers):
            attention = self._use(layer, "attention")
            inputs = self._emit(
                StepKind.ATTENTION_INPUTS,
                self.compute_lane,
                (*attention.ready, *busy_buffers),
                layer=layer,
                unit=self._unit_index(layer, "attention"),
                offset=self._offset(attention),
                flops=tokens * work.attention_inputs_flops_per_token,
            )
            busy_buffers = []
            attended = []
            for micro_batch in shape.micro_batches:
                attended.append(self._attend(layer, micro_batch, inputs, busy_buffers))
            last = self._emit(
                StepKind.ATTENTION_OUTPUT,
                self.compute_lane,
                tuple(attended),
                layer=layer,
                unit=self._unit_index(layer, "attention"),
                offset=self._offset(attention),
                flops=tokens * work.attention_output_flops_per_token,
            )
            self._release(attention, last)
            for module in self._later_modules.get(layer, ("mlp",)):
                experts = self.units[layer, module].experts if module != "mlp" else 0
                if experts:
                    self._run_module(
                        StepKind.EXPERTS, layer, module, int(tokens * experts * work.flops_per_expert_and_token)
                    )
                else:
                    self._run_module(StepKind.MLP, layer, module, tokens * work.mlp_flops_per_token[layer])
        # The next pass overwrites the rows that the last layer's copies read, so the pass ends after them; and no
        # pass leaves rows that are on neither the device nor the disk.
        waits = (*busy_buffers, *((self._last_write,) if self._last_write else ()))
        flops = shape.logits_rows * work.logits_flops_per_row
        self._run_module(StepKind.LOGITS, self.num_layers, "head", flops, waits)
        self._load_ahead()
        return self._steps

    def _run_module(
        self, kind: StepKind, layer: int, module: str, flops: int, waits: tuple[Dependency, ...] = ()
    ) -> None:
        loaded = self._use(layer, module)
        step = self._emit(
            kind,
            self.compute_lane,
            (*loaded.ready, *waits),
            layer=layer,
            unit=self._unit_index(layer, module),
            offset=self._offset(loaded),
            flops=flops,
        )
        self._release(loaded, step)

    def _attend(self, layer: int, micro_batch: MicroBatchShape, inputs: Dependency, busy: list) -> Dependency:
        """Emit the attention of one micro-batch; returns the step after which its output rows are on the device."""
        work = self.work
        where = {"layer": layer, "micro_batch": micro_batch.index}
        kv_bytes = micro_batch.kv_tokens * work.kv_bytes_per_token
        new_bytes = micro_batch.query_tokens * work.kv_bytes_per_token
        query_bytes = micro_batch.query_tokens * work.query_bytes_per_token
        flops = micro_batch.query_kv_pairs * work.attend_flops_per_pair
        if micro_batch.home is Tier.GPU or (micro_batch.home is Tier.CPU and not self.on_device):
            return self._emit(StepKind.ATTEND, self.compute_lane, (inputs,), bytes=kv_bytes, flops=flops, **where)
        key = (layer, micro_batch.index)
        there = max(kv_bytes - new_bytes, 0)  # what earlier passes left
        read, slot = (), 0  # what must be over before the host slot takes this pass's rows
        on_disk = micro_batch.home is Tier.DISK
        if on_disk:
            slot, read = self._take_slot(self._host_slots, key)
            if there:
                read = (self._emit(StepKind.READ_KV, Lane.DISK_READ, read, offset=slot, bytes=there, **where),)
        if not self.on_device:  # the step that attends also stores the new rows
            done = self._emit(
                StepKind.ATTEND, self.compute_lane, (inputs, *read), offset=slot, bytes=kv_bytes, flops=flops, **where
            )
            self._host_slots.users[slot] = (self._write_back(key, done, slot, new_bytes, where),)
            return done
        if micro_batch.attend_lane is Lane.CPU:
            down = self._emit(
                StepKind.OFFLOAD_QUERY, Lane.D2H, (inputs, *read), offset=slot, bytes=query_bytes + new_bytes, **where
            )
            busy.append(down)
            done = self._emit(StepKind.ATTEND, Lane.CPU, (down,), offset=slot, bytes=kv_bytes, flops=flops, **where)
            if on_disk:
                self._host_slots.users[slot] = (done, self._write_back(key, down, slot, new_bytes, where))
            return self._emit(StepKind.RETURN_ATTENDED, Lane.H2D, (done,), bytes=query_bytes, **where)
        device_slot, waits = self._take_slot(self._device_slots, key)
        load = self._emit(
            StepKind.LOAD_KV, Lane.H2D, (*waits, *read), offset=device_slot, source_offset=slot, bytes=there, **where
        )
        attended = self._emit(
            StepKind.ATTEND, self.compute_lane, (inputs, load), offset=device_slot, bytes=kv_bytes, flops=flops, **where
        )
        self._device_slots.users[device_slot] = (attended,)
        saved = self._emit(StepKind.SAVE_KV, Lane.D2H, (inputs, *read), offset=slot, bytes=new_bytes, **where)
        busy.append(saved)
        if on_disk:
            self._host_slots.users[slot] = (load, self._write_back(key, saved, slot, new_bytes, where))
        else:
            self._kv_saved[key] = saved
        return attended

    def _take_slot(self, slots: _Slots, key: tuple[int, int]) -> tuple[int, tuple[Dependency, ...]]:
        """The next staging slot, and what must be over before it is filled with the KV of ``key``."""
        slot = slots.following
        slots.following = (slot + 1) % len(slots.users)
        saved = self._kv_saved.get(key)
        return slot, slots.users[slot] + ((saved,) if saved else ())

    def _write_back(self, key: tuple[int, int], stored: Dependency, slot: int, nbytes: int, where: dict) -> Dependency:
        """Emit the write of new rows out of a host slot, once ``stored`` has put them there."""
        self._last_write = self._kv_saved[key] = self._emit(
            StepKind.WRITE_KV, Lane.DISK_WRITE, (stored,), offset=slot, bytes=nbytes, **where
        )
        return self._last_write

    # Weights ------------------------------------------------------------------------------------------

    def _use(self, layer: int, module: str) -> _Loaded:
        """The loads of a unit that is about to be computed with; everything that fits is read ahead first."""
        self._load_ahead()
        unit = self.units.get((layer, module))
        return self._loaded.pop((self._shape.index, unit.index), None) or _Loaded() if unit else _Loaded()

    def _release(self, loaded: _Loaded, consumer: Dependency) -> None:
        region = loaded.device_region if self.on_device else loaded.host_region
        if region is not None:
            Ring.release(region, consumer)
        self._load_ahead()

    def _offset(self, loaded: _Loaded) -> int:
        return loaded.device_offset if self.on_device else loaded.host_offset

    def _unit_index(self, layer: int, module: str) -> int:
        unit = self.units.get((layer, module))
        return unit.index if unit else -1

    def _load_ahead(self) -> None:
        progress = True
        while progress:
            progress = self._emit_read() | self._emit_copy()

    def _next(self, cursor: int, units: list[WeightUnit]) -> tuple[int, WeightUnit] | None:
        """(pass index, unit) that a cursor stands at, or None where nothing more is to be loaded for now."""
        if not units:
            return None
        pass_index, position = divmod(cursor, len(units))
        last_pass = self._shape.index + (1 if self._shape.more else 0)
        return (pass_index, units[position]) if pass_index <= last_pass else None

    def _emit_read(self) -> bool:
        target = self._next(self._read_cursor, self._read_units)
        taken = self._host_ring.take(target[1].disk_bytes) if target else None
        if taken is None:
            return False
        (pass_index, unit), (offset, region, waits) = target, taken
        step = self._emit(
            StepKind.READ_WEIGHTS,
            Lane.DISK_READ,
            waits,
            layer=unit.layer,
            unit=unit.index,
            offset=offset,
            bytes=unit.disk_bytes,
        )
        self._loaded[pass_index, unit.index] = _Loaded((step,), host_offset=offset, host_region=region)
        self._read_cursor += 1
        return True

    def _emit_copy(self) -> bool:
        target = self._next(self._copy_cursor, self._copy_units)
        if target is None:
            return False
        pass_index, unit = target
        loaded = self._loaded.get((pass_index, unit.index))
        if unit.disk_bytes and loaded is None:
            return False  # its read is not emitted yet
        size_bytes = unit.disk_bytes + unit.host_bytes
        taken = self._device_ring.take(size_bytes)
        if taken is None:
            return False
        offset, region, waits = taken
        loaded = loaded or _Loaded()
        step = self._emit(
            StepKind.COPY_WEIGHTS,
            Lane.H2D,
            (*loaded.ready, *waits),
            layer=unit.layer,
            unit=unit.index,
            offset=offset,
            source_offset=loaded.host_offset,
            bytes=size_bytes,
        )
        if loaded.host_region is not None:
            Ring.release(loaded.host_region, step)
        loaded.ready, loaded.device_offset, loaded.device_region = (step,), offset, region
        self._loaded[pass_index, unit.index] = loaded
        self._copy_cursor += 1
        return True

    def _emit(self, kind: StepKind, lane: Lane, depends_on: tuple[Dependency, ...] = (), **fields) -> Dependency:
        latest: dict[Lane, int] = {}
        for dependency_lane, order in depends_on:
            if dependency_lane is not lane:  # a lane keeps its own order
                latest[dependency_lane] = max(order, latest.get(dependency_lane, -1))
        order = self._orders[lane]
        self._orders[lane] = order + 1
        self._steps.append(Step(kind, lane, order, self._shape.index, tuple(latest.items()), **fields))
        return (lane, order)
