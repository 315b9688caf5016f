"""Where the weights are while a run lasts: resident tensors, streaming rings, and the copies between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flexrun.compress import GroupFormat, GroupwiseMatrix, quantise
from flexrun.core import DTYPES, Tier, align_up
from flexrun.disk_io import Block, DirectFile, RowFile, blocks_of
from flexrun.errors import ConfigError
from flexrun.models.spec import ModelSpec
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.tiers import Buffer, MemoryTier
from flexrun.placement import MemoryAccount, PlacedTensor, WeightPlacement, expert_number, is_multiplied, unit_of
from flexrun.steps import Step, StepKind
from flexrun.weights.packed import PackedWeights

TOKEN_EMBEDDING = "token_embedding.weight"
Weight = Tensor | GroupwiseMatrix
CHUNK_BYTES = 16 << 20  # of one copy to the device: full speed, and nothing waits long behind it


@dataclass
class _Unit:
    """One unit's tensors: resident on the compute device, and those that come from disk or from host RAM."""

    resident: dict[str, Weight] = field(default_factory=dict)
    from_disk: list[PlacedTensor] = field(default_factory=list)
    from_host: list[tuple[PlacedTensor, Weight]] = field(default_factory=list)
    disk_bytes: int = 0
    experts: set[int] = field(default_factory=set)
    is_last_of_layer: bool = False


class WeightStore:
    """Loads what is resident, streams the rest.

    Tensors whose home is the compute tier are used in place. Disk tensors are read to the host ring; with a
    device, they and the host-resident ones are copied on to the device ring.
    """

    def __init__(
        self,
        spec: ModelSpec,
        packed: PackedWeights,
        placement: WeightPlacement,
        account: MemoryAccount,
        host: MemoryTier,
        device: MemoryTier | None,
        *,
        accelerator: EmulatedDevice | None = None,
        read_threads: int = 4,
        direct: bool = True,
        pack: Callable[[Tensor], Tensor] | None = None,
        activation_bits: int = 16,
    ):
        """``pack`` turns a matrix in RAM that the host multiplies by into the form its matmul likes best (it takes the
        same bytes). activation_bits: see GroupwiseMatrix."""
        self.spec, self.packed, self.placement = spec, packed, placement
        self._dtype, self._activation_bits = DTYPES[spec.dtype], activation_bits
        self._compute_tier = Tier.CPU if device is None else Tier.GPU
        self._files: dict[str, DirectFile] = {}
        self._units = [_Unit() for _ in placement.units]
        self._unit_index = {(unit.layer, unit.module): unit.index for unit in placement.units}
        for last in {unit.layer: unit.index for unit in placement.units}.values():
            self._units[last].is_last_of_layer = True
        self.embedding: dict[str, Tensor] = {}
        self.embedding_rows: RowFile | None = None
        self._buffers: list[Buffer] = []
        # layer -> experts that the CPU runs beside a device, and their weights
        self._on_cpu: dict[int, tuple[list[int], dict[str, Weight]]] = {}
        self._pack = pack
        self._host, self._accelerator = host, accelerator or EmulatedDevice()
        self._packed_bytes = 0
        self._staging: Buffer | None = None
        with ExitStack() as undo:  # files stay open and bytes counted unless they are given back
            undo.callback(self.close)
            for name in dict.fromkeys(entry.file for entry in packed.entries.values()):
                self._files[name] = DirectFile(packed.folder / name, direct=direct)
            self._load(host, device, read_threads)
            self.host_ring = self._ring(host, account.host_ring_bytes)
            self.device_ring = self._ring(device, account.device_ring_bytes) if device is not None else None
            slot_bytes = account.bytes_by_kind.get(Tier.GPU, {}).get("dense_weights", 0)
            self._slot = self._ring(device, slot_bytes, "dense_weights") if device is not None else None
            undo.pop_all()

    def _ring(self, tier: MemoryTier, nbytes: int, kind: str = "ring") -> Buffer | None:
        if not nbytes:
            return None
        self._buffers.append(tier.allocate(kind, nbytes, touch=True))
        return self._buffers[-1]

    def _load(self, host: MemoryTier, device: MemoryTier | None, read_threads: int) -> None:
        """Read every resident tensor, several requests in flight, into one arena a tier."""
        sizes = dict.fromkeys((Tier.CPU, Tier.GPU), 0)
        for placed in self.placement.tensors:
            if placed.tier is not Tier.DISK and not self._is_packed(placed):
                sizes[placed.tier] += align_up(placed.nbytes)
        arenas = {}
        for tier, memory in ((Tier.CPU, host), (Tier.GPU, device)):
            if sizes[tier]:
                arenas[tier] = memory.allocate("weights", sizes[tier])
                self._buffers.append(arenas[tier])
        offsets = dict.fromkeys(sizes, 0)
        with ThreadPoolExecutor(read_threads) as pool:
            reads = []
            for placed in self.placement.tensors:
                value = None
                if self._is_packed(placed):
                    value = self._load_packed(placed, pool)
                elif placed.tier is not Tier.DISK:
                    arena, offset = arenas[placed.tier], offsets[placed.tier]
                    offsets[placed.tier] += align_up(placed.nbytes)
                    if placed.tier is Tier.GPU and self._accelerator.is_separate:
                        self._load_through_host(placed, arena.data[offset:], pool)
                    else:
                        reads += [pool.submit(block.read) for block in self._blocks(placed, arena.data[offset:])]
                    value = self._view(arena, offset, placed)
                self._register(placed, value)
            for read in reads:
                read.result()
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def _dtype_of(self, placed: PlacedTensor) -> torch.dtype:
        return DTYPES[placed.tensor.dtype] if placed.tensor.dtype else self._dtype

    def _view(self, buffer: Buffer, offset: int, placed: PlacedTensor) -> Weight:
        """A tensor over the bytes of a buffer, or a compressed matrix."""
        shape, dtype = placed.tensor.shape, self._dtype_of(placed)
        if placed.form is None:
            return buffer.view(offset, shape, dtype)
        data = buffer.data[offset : offset + placed.nbytes]
        return GroupwiseMatrix(data, shape, placed.form, dtype, self._activation_bits)

    def _is_packed(self, placed: PlacedTensor) -> bool:
        """Matrices that only a matmul ever reads; an embedding is read by rows as well, a router cast to float32."""
        tensor = placed.tensor
        is_matrix = len(tensor.shape) == 2 and tensor.module != "embedding" and "router" not in tensor.name
        by_cpu = placed.stays or (placed.tier is Tier.CPU and self._compute_tier is Tier.CPU)
        return self._pack is not None and is_matrix and placed.form is None and by_cpu

    def _load_packed(self, placed: PlacedTensor, pool: ThreadPoolExecutor) -> Tensor:
        nbytes = align_up(placed.nbytes)
        self._host.reserve("weights", nbytes)
        self._packed_bytes += nbytes
        staging = Buffer.outside_budget(nbytes)
        for read in [pool.submit(block.read) for block in self._blocks(placed, staging.data)]:
            read.result()
        return self._pack(staging.view(0, placed.tensor.shape, self._dtype))

    def _load_through_host(self, placed: PlacedTensor, target: Tensor, pool: ThreadPoolExecutor) -> None:
        """Read a tensor in pieces to pinned memory and copy each to the device."""
        if self._staging is None:
            self._staging = Buffer.outside_budget(CHUNK_BYTES, self._accelerator.host_memory)
        entry = self.packed.entry(placed.layer, placed.tensor.name)
        for start in range(0, align_up(entry.nbytes), CHUNK_BYTES):
            nbytes = min(CHUNK_BYTES, entry.nbytes - start)
            blocks = blocks_of(self._files[entry.file], entry.offset + start, nbytes, self._staging.data)
            for read in [pool.submit(block.read) for block in blocks]:
                read.result()
            self._accelerator.copy(target[start : start + nbytes], self._staging.data[:nbytes])
            self._accelerator.settle()  # before the next piece is read over it

    def _blocks(self, placed: PlacedTensor, target: Tensor) -> list[Block]:
        entry = self.packed.entry(placed.layer, placed.tensor.name)
        return blocks_of(self._files[entry.file], entry.offset, entry.nbytes, target)

    def _register(self, placed: PlacedTensor, value: Weight | None) -> None:
        name = placed.tensor.name
        if placed.tensor.module == "embedding":
            if value is not None:
                self.embedding[name] = value
            else:
                entry = self.packed.entry(placed.layer, name)
                row_bytes = placed.nbytes // placed.tensor.shape[0]
                self.embedding_rows = RowFile(self.packed.path(entry), entry.offset, row_bytes)
        if placed.stays:
            experts, weights = self._on_cpu.setdefault(placed.layer, ([], {}))
            weights[name], expert = value, expert_number(placed.tensor)
            if expert not in experts[-1:]:  # tensors come in their order
                experts.append(expert)
            return
        key = unit_of(self.spec, placed.layer, placed.tensor)
        if key is None:
            return
        unit = self._units[self._unit_index[key]]
        if placed.tensor.module == "experts":
            unit.experts.add(expert_number(placed.tensor))
        if placed.tier is Tier.DISK:
            unit.from_disk.append(placed)
            unit.disk_bytes += align_up(placed.nbytes)
        elif placed.tier is self._compute_tier:
            unit.resident[_weight_name(placed)] = value
        else:
            unit.from_host.append((placed, value))

    # Steps --------------------------------------------------------------------------------------------

    def read_parts(self, step: Step, chosen: Sequence[int] | None = None) -> list[Callable[[], None]]:
        """The block reads of a READ_WEIGHTS step, to the host ring at ``step.offset``.

        chosen: how many tokens chose each expert; those of none are not read, and leave a gap.
        """
        offset, parts = step.offset, []
        for placed in self._units[step.unit].from_disk:
            if _is_moved(placed, chosen):
                parts += [block.read for block in self._blocks(placed, self.host_ring.data[offset:])]
            offset += align_up(placed.nbytes)
        return parts or [_nothing]

    def copy_parts(self, step: Step, chosen: Sequence[int] | None = None) -> list[Callable[[], None]]:
        """The host-to-device copies of a COPY_WEIGHTS step, in chunks. chosen: see read_parts."""
        unit, parts = self._units[step.unit], []
        if chosen is None and unit.disk_bytes:
            source = self.host_ring.data[step.source_offset : step.source_offset + unit.disk_bytes]
            parts += self._copies(step.offset, source)
        elif chosen is not None:
            start = step.source_offset
            for placed in unit.from_disk:
                stop = start + align_up(placed.nbytes)
                if _is_moved(placed, chosen):
                    parts += self._copies(step.offset + start - step.source_offset, self.host_ring.data[start:stop])
                start = stop
        offset = step.offset + unit.disk_bytes
        for placed, value in unit.from_host:
            if _is_moved(placed, chosen):
                parts += self._copies(offset, _bytes_of(value))
            offset += align_up(placed.nbytes)
        return parts or [_nothing]

    def moved_bytes(self, step: Step, chosen: Sequence[int] | None) -> int:
        """What read_parts or copy_parts moves."""
        unit = self._units[step.unit]
        moved = list(unit.from_disk)
        if step.kind is StepKind.COPY_WEIGHTS:
            moved += [placed for placed, _ in unit.from_host]
        return sum(align_up(placed.nbytes) for placed in moved if _is_moved(placed, chosen))

    def experts_of(self, unit: int) -> list[int]:
        """The routed experts among a unit's weights that the compute lane runs, ascending."""
        return sorted(self._units[unit].experts)

    def cpu_experts(self, layer: int) -> tuple[list[int], Mapping[str, Weight]]:
        """The routed experts of a layer that the CPU runs beside a device, ascending, and their weights in RAM."""
        return self._on_cpu.get(layer, ([], {}))

    def is_last_of_layer(self, unit: int) -> bool:
        return self._units[unit].is_last_of_layer

    def _copies(self, offset: int, source: Tensor) -> list[Callable[[], None]]:
        target = self.device_ring.data[offset : offset + len(source)]
        chunks = zip(target.split(CHUNK_BYTES), source.split(CHUNK_BYTES))
        return [partial(self._accelerator.copy, *chunk) for chunk in chunks]

    def unit_weights(self, step: Step, calls: int = 1) -> dict[str, Weight]:
        """Packed names and tensors of the unit that a compute step uses, streamed ones viewed in their ring.

        calls: that the step takes. For several of them, matrices that a product needs dense are made so once for all.
        """
        unit = self._units[step.unit]
        weights = unit.resident
        if unit.from_disk or unit.from_host:
            weights = dict(weights)
            ring = self.host_ring if self._compute_tier is Tier.CPU else self.device_ring
            offset = step.offset
            for placed in [*unit.from_disk, *(item for item, _ in unit.from_host)]:
                weights[_weight_name(placed)] = self._view(ring, offset, placed)
                offset += align_up(placed.nbytes)
        return weights if calls == 1 or self._slot is None else {**weights, **self._dense(step, weights)}

    def _dense(self, step: Step, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
        """The matrices that a step needs dense, in the slot, which the next step of several calls takes over."""
        found, offset = {}, 0
        for name, weight in weights.items():
            if not isinstance(weight, GroupwiseMatrix) or weight.multiplies_codes:
                continue
            nbytes = align_up(weight.shape.numel() * weight.dtype.itemsize)
            if is_multiplied(step.kind, name) and offset + nbytes <= len(self._slot.data):
                found[name] = self._slot.view(offset, tuple(weight.shape), weight.dtype)
                offset += nbytes
                weight.dequantised(found[name])
        return found

    @contextmanager
    def compressed(self, layer: int, name: str, form: GroupFormat) -> Iterator[None]:
        """A resident matrix compressed for a while, which is not counted: to see what that does to the answers.

        Raises ConfigError where the matrix is streamed, or compressed already.
        """
        placed = next(each for each in self.placement.tensors if (each.layer, each.tensor.name) == (layer, name))
        resident = self._units[self._unit_index[unit_of(self.spec, layer, placed.tensor)]].resident
        if _weight_name(placed) not in resident or placed.form is not None:
            raise ConfigError(f"{name} of layer {layer} is not in RAM in its own dtype", "raise --cpu-memory")
        staging = Buffer.outside_budget(placed.nbytes)
        for block in self._blocks(placed, staging.data):
            block.read()
        dense = staging.view(0, placed.tensor.shape, self._dtype)
        kept = resident[_weight_name(placed)]
        resident[_weight_name(placed)] = GroupwiseMatrix(quantise(dense, form), dense.shape, form, self._dtype)
        try:
            yield
        finally:
            resident[_weight_name(placed)] = kept

    def close(self) -> None:
        for file in [*self._files.values(), self.embedding_rows]:
            if file is not None:
                file.close()
        for unit in self._units:
            unit.resident, unit.from_host = {}, []
        self.embedding, self._on_cpu = {}, {}
        for buffer in (*self._buffers, self._staging):
            if buffer is not None:
                buffer.close()
        if self._packed_bytes:
            self._host.release("weights", self._packed_bytes)
            self._packed_bytes = 0


def _bytes_of(value: Weight) -> Tensor:
    return value.data if isinstance(value, GroupwiseMatrix) else value.view(-1).view(torch.uint8)


def _is_moved(placed: PlacedTensor, chosen: Sequence[int] | None) -> bool:
    return chosen is None or chosen[expert_number(placed.tensor)] > 0


def _nothing() -> None:
    """The only part of a step that has nothing to move."""


def _weight_name(placed: PlacedTensor) -> str:
    """A tied token embedding is used as the head."""
    return "lm_head.weight" if placed.tensor.name == TOKEN_EMBEDDING else placed.tensor.name
