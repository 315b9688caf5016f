"""Weights on their way through the rings: which unit is read and copied when, and where its bytes will be.

Everything that fits is loaded ahead, also across the border between two passes. Only where a pass has so few tokens
that many experts of a layer are chosen by none, experts wait for the router, and those nobody chose are not moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexrun.core import Lane
from flexrun.errors import BudgetError, ExecutionError
from flexrun.steps import Dependency, PassShape, StepKind, WeightUnit

USES = {"attention": 2}  # steps that use a unit, where they are more than one: before attention and after it


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
class Loaded:
    """A unit on its way to the compute device, or there: what to wait for, and where its bytes will be.

    unit: its index, -1 for one that has no weights. offset: in the ring that compute steps read.
    """

    unit: int = -1
    ready: tuple[Dependency, ...] = ()
    offset: int = 0
    host_offset: int = 0
    host_region: list | None = None
    device_region: list | None = None
    uses_left: int = 0


class WeightStream:
    """Emits the reads and copies of weight units, pass after pass, in the order in which the units are used.

    emit(kind, lane, depends_on, **fields) adds a step to the pass at hand.
    """

    def __init__(
        self,
        units: Sequence[WeightUnit],
        emit: Callable[..., Dependency],
        *,
        on_device: bool,
        host_ring_bytes: int,
        device_ring_bytes: int,
    ):
        self._units = {(unit.layer, unit.module): unit for unit in units}
        self._emit, self._on_device = emit, on_device
        self._host_ring, self._device_ring = Ring(host_ring_bytes), Ring(device_ring_bytes)
        self._read_units = [unit for unit in units if unit.disk_bytes]
        self._copy_units = [unit for unit in units if on_device and unit.disk_bytes + unit.host_bytes]
        self._loaded: dict[tuple[int, int], Loaded] = {}  # (pass, unit) -> loads emitted, not yet used
        self._held: dict[tuple[int, str], Loaded] = {}  # (layer, module) -> units in use
        self._read_cursor = 0  # counts units over all passes
        self._copy_cursor = 0
        self._shape: PassShape | None = None
        self._parts = 1
        self._room_changed = True  # since loads were last emitted
        self._chosen_share = 1.0
        self._routed: dict[int, Dependency] = {}  # layer -> the step of this pass that sends its tokens to experts

    def begin(self, shape: PassShape, parts: int, chosen_share: float = 1.0) -> None:
        """Take up a pass whose compute steps each come ``parts`` times, over as many parts of its rows.

        chosen_share: below 1, experts are moved only when their layer is routed, and then those that were chosen:
        this share, by expectation.
        """
        self._shape, self._parts, self._room_changed = shape, parts, True
        self._chosen_share = chosen_share
        self._routed.clear()
        self.load_ahead()

    def routed(self, layer: int, step: Dependency) -> None:
        """After ``step``, the experts of the layer that tokens of this pass chose are known."""
        self._routed[layer], self._room_changed = step, True

    def ready(self, layer: int, module: str) -> bool:
        """Whether the unit can be used now. False: its room in the ring is taken by units still in use."""
        unit = self._units.get((layer, module))
        if unit is None or (layer, module) in self._held or not self._streams(unit):
            return True
        self.load_ahead()
        loaded = self._loaded.get((self._shape.index, unit.index))
        return loaded is not None and (loaded.device_region if self._on_device else loaded.host_region) is not None

    def use(self, layer: int, module: str) -> Loaded:
        """The loads of a unit that is about to be computed with; everything that fits is loaded ahead first."""
        key, unit = (layer, module), self._units.get((layer, module))
        if unit is None:
            return Loaded()
        self.load_ahead()
        if key not in self._held:
            if not self.ready(layer, module):
                raise ExecutionError(f"the weights of layer {layer} ({module}) find no room in the streaming buffer")
            loaded = self._loaded.pop((self._shape.index, unit.index), None) or Loaded()
            loaded.unit, loaded.uses_left = unit.index, USES.get(module, 1) * (1 if module == "head" else self._parts)
            self._held[key] = loaded
        return self._held[key]

    def used(self, layer: int, module: str, consumer: Dependency) -> None:
        """``consumer`` is one more step that uses the unit; after its last, its room is free."""
        loaded = self._held.get((layer, module))
        if loaded is None:
            return
        loaded.ready = ()  # its next users run after this one, on the same lane
        loaded.uses_left -= 1
        if loaded.uses_left == 0:
            del self._held[layer, module]
            region = loaded.device_region if self._on_device else loaded.host_region
            if region is not None:
                Ring.release(region, consumer)
                self._room_changed = True
            self.load_ahead()

    def load_ahead(self) -> None:
        """Emit every load for which there is room."""
        while self._room_changed:
            self._room_changed = self._emit_read() | self._emit_copy()

    def _streams(self, unit: WeightUnit) -> bool:
        return unit.disk_bytes + unit.host_bytes > 0 if self._on_device else unit.disk_bytes > 0

    def _next(self, cursor: int, units: list[WeightUnit]) -> tuple[int, WeightUnit] | None:
        """(pass index, unit) that a cursor stands at, or None where nothing more is to be loaded for now."""
        if not units:
            return None
        pass_index, position = divmod(cursor, len(units))
        last_pass = self._shape.index + (1 if self._shape.more else 0)
        return (pass_index, units[position]) if pass_index <= last_pass else None

    def _choice(self, pass_index: int, unit: WeightUnit) -> tuple[float, tuple[Dependency, ...]] | None:
        """(share of the unit that is moved, steps that decide which), or None while those are not emitted yet."""
        if not unit.experts or self._chosen_share >= 1:
            return 1.0, ()
        if pass_index != self._shape.index or unit.layer not in self._routed:
            return None
        return self._chosen_share, (self._routed[unit.layer],)

    def _emit_read(self) -> bool:
        target = self._next(self._read_cursor, self._read_units)
        choice = self._choice(*target) if target else None
        taken = self._host_ring.take(target[1].disk_bytes) if choice else None
        if taken is None:
            return False
        (pass_index, unit), (offset, region, waits), (share, routed) = target, taken, choice
        step = self._emit(
            StepKind.READ_WEIGHTS,
            Lane.DISK_READ,
            (*waits, *routed),
            layer=unit.layer,
            unit=unit.index,
            offset=offset,
            bytes=int(unit.disk_bytes * share),
            chosen=bool(routed),
        )
        self._loaded[pass_index, unit.index] = Loaded(
            ready=(step,), offset=offset, host_offset=offset, host_region=region
        )
        self._read_cursor += 1
        return True

    def _emit_copy(self) -> bool:
        target = self._next(self._copy_cursor, self._copy_units)
        if target is None:
            return False
        pass_index, unit = target
        loaded, choice = self._loaded.get((pass_index, unit.index)), self._choice(pass_index, unit)
        if choice is None or (unit.disk_bytes and loaded is None):
            return False  # its read is not emitted yet
        size_bytes = unit.disk_bytes + unit.host_bytes
        taken = self._device_ring.take(size_bytes)
        if taken is None:
            return False
        (offset, region, waits), (share, routed) = taken, choice
        loaded = loaded or Loaded()
        step = self._emit(
            StepKind.COPY_WEIGHTS,
            Lane.H2D,
            (*loaded.ready, *waits, *routed),
            layer=unit.layer,
            unit=unit.index,
            offset=offset,
            source_offset=loaded.host_offset,
            bytes=int(size_bytes * share),
            chosen=bool(routed),
        )
        if loaded.host_region is not None:
            Ring.release(loaded.host_region, step)
        loaded.ready, loaded.offset, loaded.device_region = (step,), offset, region
        self._loaded[pass_index, unit.index] = loaded
        self._copy_cursor += 1
        return True
