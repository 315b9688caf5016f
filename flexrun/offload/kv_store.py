"""The KV cache: one slab a (layer, attention micro-batch), in which every sequence owns a contiguous run of tokens.

Slabs are token-major, [planes, tokens, heads, width]: keys and values [2, tokens, kv_heads, head_dim], or one latent
for all heads [1, tokens, 1, width]. Ragged sequences lie side by side without padding, and what is in use of a slab
moves as few large copies.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from flexrun.attention import Segments
from flexrun.compress import GROUP_TOKENS, KVFormat
from flexrun.core import DTYPES, Lane, Tier, align_up
from flexrun.models.spec import ModelSpec
from flexrun.offload.coded_kv import CodedSlab
from flexrun.offload.kv_file import GAP_BYTES, Blocks, KVFile, blocks_of_pass, cover
from flexrun.offload.tiers import Buffer, MemoryTier
from flexrun.placement import KV_SLOTS, KVMicroBatch, attended_on_host, host_kv_slots, kv_block_bytes, room_of_groups
from flexrun.steps import Step


@dataclass(frozen=True, slots=True)
class Region:
    """Tokens ``[start, start + capacity)`` of every slab of one micro-batch."""

    micro_batch: int
    start: int
    capacity: int


class TokenSpace:
    """First-fit allocation of contiguous token runs in one micro-batch, merging what is freed."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._free = [(0, capacity)] if capacity else []  # (start, end), sorted, never adjacent

    @property
    def free_tokens(self) -> int:
        return sum(end - start for start, end in self._free)

    def allocate(self, tokens: int) -> int | None:
        for place, (start, end) in enumerate(self._free):
            if end - start >= tokens:
                self._free[place : place + 1] = [(start + tokens, end)] if end - start > tokens else []
                return start
        return None

    def release(self, start: int, tokens: int) -> None:
        end = start + tokens
        place = bisect.bisect_left(self._free, (start, end))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == start:
            start = self._free.pop(place - 1)[0]
            place -= 1
        self._free.insert(place, (start, end))


@dataclass(frozen=True, slots=True)
class _Moves:
    """What a pass moves of every layer's slab of one micro-batch; blocks: of one that lives on disk."""

    cached_runs: list[tuple[int, int]]
    blocks: Blocks | None


class KVStore:
    """Slabs for every layer of every micro-batch, in the memory of each micro-batch's home tier or in a file.

    A slab on disk passes through a staging slot of the host; what is attended elsewhere than at home, through one of
    the compute device. Slabs on disk and their slots keep the keys and values of a token together, so that a
    sequence is one range of bytes; whatever lies behind it, a slab's tensor is [planes, tokens, heads, width].
    Sequences of a micro-batch that have their newest tokens on the device lie in two slabs: see KVMicroBatch.split.
    """

    def __init__(
        self,
        spec: ModelSpec,
        micro_batches: tuple[KVMicroBatch, ...],
        host: MemoryTier,
        device: MemoryTier | None,
        disk: MemoryTier | None = None,
        folder: Path | None = None,
        *,
        max_sequences: int = 1,
        direct: bool = True,
        form: KVFormat | None = None,
    ):
        """``disk`` and ``folder``: where micro-batches whose home is the disk live, of at most ``max_sequences``
        sequences each. form: how KV is compressed, None: not at all. Raises BudgetError or ConfigError where a tier is
        too small or the folder cannot be written."""
        self.micro_batches = micro_batches
        self._spec = spec
        self._dtype = DTYPES[spec.dtype]
        self._spaces = [TokenSpace(micro_batch.capacity_tokens) for micro_batch in micro_batches]
        self._regions: list[dict[int, int]] = [{} for _ in micro_batches]  # start -> capacity of those in use
        self._buffers: list[Buffer] = []
        self._slabs: list[list[Tensor]] = []
        self._device_slabs: list[list[Tensor]] = []  # of what a micro-batch on the host has on the device
        self.form = form
        self._row_bytes = spec.kv_elements_per_token * self._dtype.itemsize if form is None else form.token_bytes
        self._slot_bytes = align_up(self.largest_sequence_tokens * self._row_bytes)
        self._moves: dict[int, tuple[Segments, _Moves]] = {}  # of each micro-batch, for the pass at hand
        self._host_slots: Buffer | None = None
        self._device_slots: Buffer | None = None
        self._tails: Buffer | None = None  # of each slab on disk: a block for each of its sequences
        # of each micro-batch [layers, 2, max_sequences, 64, heads, width]; see coded_kv
        self._recent: dict[int, Tensor] = {}
        # micro-batch -> start of a region -> its place among tails or recent rows
        self._places: dict[int, dict[int, int]] = {}
        self._tails_bytes = max_sequences * kv_block_bytes(spec)  # of one slab
        self.file: KVFile | None = None
        on_disk = [index for index, place in enumerate(micro_batches) if place.home is Tier.DISK]
        self._disk_places = {index: place for place, index in enumerate(on_disk)}
        if on_disk:  # first: a full disk shows before any memory is filled
            slabs, block_bytes = len(on_disk) * spec.num_layers, kv_block_bytes(spec)
            self.file = KVFile(folder, self._slot_bytes, slabs, block_bytes, disk, direct=direct)
        self._places = {index: {} for index in (on_disk if form is None else range(len(micro_batches)))}
        try:
            self._allocate(host, device)
            if form is not None:
                self._allocate_recent(host, device, max_sequences)
        except BaseException:
            self.close()
            raise

    def _allocate(self, host: MemoryTier, device: MemoryTier | None) -> None:
        for place in self.micro_batches:
            there = place.device_tokens(place.capacity_tokens)
            memory, tokens = (device if place.home is Tier.GPU else host), place.capacity_tokens - there
            tokens = tokens if place.home is not Tier.DISK else 0
            self._slabs.append(self._new_slabs(memory, tokens, self.form is not None and not place.shared))
            self._device_slabs.append(self._new_slabs(device, there))
        if self.file is not None:
            slabs = len(self._disk_places) * self._spec.num_layers
            slots = host_kv_slots(self._slot_bytes, slabs)
            self._host_slots = self._buffer(host, "kv_staging", slots * self._slot_bytes)
            self._tails = self._buffer(host, "kv_tails", slabs * self._tails_bytes)
        if any(place.home is not Tier.GPU and place.attend_lane is Lane.GPU for place in self.micro_batches):
            self._device_slots = self._buffer(device, "kv_staging", KV_SLOTS * self._slot_bytes)

    def _new_slabs(self, memory: MemoryTier, tokens: int, compressed: bool = False) -> list[Tensor]:
        """One a layer, in one buffer; none where they would be empty."""
        if not tokens:
            return []
        row_bytes = self._row_bytes if compressed else self._spec.kv_elements_per_token * self._dtype.itemsize
        layers, slab_bytes, (planes, *row) = self._spec.num_layers, tokens * row_bytes, self._spec.kv_planes
        buffer = self._buffer(memory, "kv", slab_bytes * layers)
        if compressed:
            shape = (tokens // GROUP_TOKENS, self.form.record_bytes)
            return [buffer.view(layer * slab_bytes, shape, torch.uint8) for layer in range(layers)]
        return [buffer.view(layer * slab_bytes, (planes, tokens, *row), self._dtype) for layer in range(layers)]

    def _allocate_recent(self, host: MemoryTier, device: MemoryTier | None, max_sequences: int) -> None:
        """In the memory of who attends each micro-batch."""
        planes, *row = self._spec.kv_planes
        on_host = [device is None or attended_on_host(place) for place in self.micro_batches]
        own = [index for index, place in enumerate(self.micro_batches) if not place.shared]
        for memory, there in ((host, True), (device, False)):
            chosen = [index for index in own if on_host[index] is there]
            shape = (self._spec.num_layers, len(chosen), planes, max_sequences, GROUP_TOKENS, *row)
            if chosen:
                buffer = self._buffer(memory, "kv_recent", torch.Size(shape).numel() * self._dtype.itemsize)
                rows = buffer.view(0, shape, self._dtype)
                self._recent |= {index: rows[:, number] for number, index in enumerate(chosen)}

    def _buffer(self, memory: MemoryTier, kind: str, nbytes: int) -> Buffer:
        self._buffers.append(memory.allocate(kind, nbytes, touch=True))
        return self._buffers[-1]

    def _view(self, buffer: Buffer, offset: int, micro_batch: KVMicroBatch) -> Tensor:
        tokens, (planes, *row) = micro_batch.capacity_tokens, self._spec.kv_planes
        if self.form is not None:
            return buffer.view(offset, (tokens // GROUP_TOKENS, self.form.record_bytes), torch.uint8)
        if micro_batch.home is Tier.DISK:
            return buffer.view(offset, (tokens, planes, *row), self._dtype).transpose(0, 1)
        return buffer.view(offset, (planes, tokens, *row), self._dtype)

    def allocate(self, tokens: int, max_sequences: int) -> Region | None:
        """Room for a sequence of ``tokens`` in the emptiest micro-batch that has it, or None for now.

        ``max_sequences``: most sequences one micro-batch may hold.
        """
        order = sorted(
            (
                index
                for index, (place, count) in enumerate(zip(self.micro_batches, self.sequences))
                if count < max_sequences and not place.shared
            ),
            key=lambda index: (len(self._regions[index]), -self._spaces[index].free_tokens, index),
        )
        if self.form is not None:  # the last tokens, of a group that is never complete, wait elsewhere
            tokens = room_of_groups(tokens)
        for index in order:
            start = self._spaces[index].allocate(tokens)
            if start is not None:
                self._regions[index][start] = tokens
                if index in self._places:
                    places = self._places[index]
                    places[start] = min(set(range(len(places) + 1)) - set(places.values()))
                return Region(index, start, tokens)
        return None

    def release(self, region: Region) -> None:
        self._spaces[region.micro_batch].release(region.start, region.capacity)
        del self._regions[region.micro_batch][region.start]
        self._places.get(region.micro_batch, {}).pop(region.start, None)

    @property
    def shares_prefixes(self) -> bool:
        """Whether the first micro-batch is that of shared prefixes."""
        return self.micro_batches[0].shared

    def allocate_prefix(self, tokens: int) -> int | None:
        """First row of room for a prefix that sequences share, or None for now."""
        return self._spaces[0].allocate(tokens)

    def release_prefix(self, start: int, tokens: int) -> None:
        self._spaces[0].release(start, tokens)

    @property
    def sequences(self) -> list[int]:
        """Sequences in each micro-batch."""
        return [len(regions) for regions in self._regions]

    @property
    def free_tokens(self) -> int:
        """Tokens of room that no sequence has, in all micro-batches together."""
        spaces = zip(self.micro_batches, self._spaces)
        return sum(space.free_tokens for place, space in spaces if not place.shared)

    @property
    def largest_sequence_tokens(self) -> int:
        """Tokens of the longest sequence that could ever fit."""
        return max(place.capacity_tokens for place in self.micro_batches if not place.shared)

    def slab(self, layer: int, micro_batch: int) -> Tensor:
        """[planes, tokens, heads, width] in the memory of the micro-batch's home tier, which is not the disk."""
        return self._slabs[micro_batch][layer]

    def slab_on_device(self, layer: int, micro_batch: int) -> Tensor:
        """The same of what a micro-batch whose home is the host has on the device."""
        return self._device_slabs[micro_batch][layer]

    def coded(self, layer: int, micro_batch: int, slot: int) -> CodedSlab:
        """A compressed slab where it is attended, with its recent rows: at home, or in ``slot`` of the host, for one on
        disk, or of the device."""
        place = self.micro_batches[micro_batch]
        staged = place.home is not Tier.GPU and place.attend_lane is Lane.GPU
        records = self.staging(slot, micro_batch) if staged else self.on_host(layer, micro_batch, slot)
        return CodedSlab(self.form, records, self.recent(layer, micro_batch))

    def recent(self, layer: int, micro_batch: int) -> Tensor:
        """See CodedSlab."""
        return self._recent[micro_batch][layer]

    def places(self, micro_batch: int, starts: numpy.ndarray) -> numpy.ndarray:
        """The place among the recent rows of the sequences whose regions begin at ``starts``; int64."""
        return numpy.array([self._places[micro_batch][start] for start in starts.tolist()], dtype=numpy.int64)

    def group_counts(self, query: numpy.ndarray, kv: numpy.ndarray, fresh: numpy.ndarray) -> dict[str, int]:
        """Groups of a compressed cache in the counts of MicroBatchShape. query, kv: int64 [sequences], new rows and all
        tokens of each; fresh: tokens of the prompts that start."""
        if self.form is None:
            return {}
        there, then = (int((tokens // GROUP_TOKENS).sum()) for tokens in (kv - query, kv))
        fresh_groups = int((fresh // GROUP_TOKENS).sum())
        return {"there_groups": there, "new_groups": then - there, "fresh_groups": fresh_groups}

    def on_host(self, layer: int, micro_batch: int, slot: int) -> Tensor:
        """The slab of a micro-batch that lives on the host, or the host's ``slot`` for one that lives on disk."""
        if micro_batch in self._disk_places:
            return self._view(self._host_slots, slot * self._slot_bytes, self.micro_batches[micro_batch])
        return self._slabs[micro_batch][layer]

    def staging(self, slot: int, micro_batch: int) -> Tensor:
        """The slot in the memory of the compute device through which a micro-batch from another tier is attended.

        Laid out like the micro-batch's slab at home, so that what is in use moves as few copies.
        """
        slots = self._host_slots if self._device_slots is None else self._device_slots
        return self._view(slots, slot * self._slot_bytes, self.micro_batches[micro_batch])

    # KV on disk ---------------------------------------------------------------------------------------

    def read_parts(self, step: Step, segments: Segments) -> list[Callable[[], None]]:
        """READ_KV: what earlier passes left of a micro-batch's ``segments``, to the host slot ``step.offset``."""
        return self.file.read_parts(*self._moved(step, segments)) or [_nothing]

    def write_parts(self, step: Step, segments: Segments) -> list[Callable[[], None]]:
        """WRITE_KV: the rows that this pass adds to ``segments``, out of the host slot ``step.offset``."""
        return self.file.write_parts(*self._moved(step, segments)) or [_nothing]

    def _moved(self, step: Step, segments: Segments) -> tuple[int, Blocks, int, int]:
        slab = self._disk_places[step.micro_batch] * self._spec.num_layers + step.layer
        address = self._host_slots.data.data_ptr() + step.offset * self._slot_bytes
        tails = self._tails.data.data_ptr() + slab * self._tails_bytes
        return slab, self._moves_of(step.micro_batch, segments).blocks, address, tails

    # What a pass moves --------------------------------------------------------------------------------

    def cached_runs(self, micro_batch: int, segments: Segments) -> list[tuple[int, int]]:
        """Tokens, or records, (start, stop) of a slab that earlier passes left for ``segments``, sorted; small gaps are
        included."""
        return self._moves_of(micro_batch, segments).cached_runs

    def _moves_of(self, micro_batch: int, segments: Segments) -> _Moves:
        """The same for every layer, so worked out once a pass."""
        known = self._moves.get(micro_batch)
        if known is None or known[0] is not segments:
            start, stop = segments.kv_start, segments.kv_start + segments.kv_len
            middle = stop - segments.query_len
            if self.form is not None:
                stop, middle = (each // GROUP_TOKENS * GROUP_TOKENS for each in (stop, middle))
            unit = 1 if self.form is None else GROUP_TOKENS
            runs = cover(numpy.stack([start, middle], axis=1) // unit, 1, GAP_BYTES // (self._row_bytes * unit))
            blocks = None
            if micro_batch in self._disk_places:
                places = self.places(micro_batch, start).tolist()
                rows = numpy.stack([start, middle, stop], axis=1) * self._row_bytes
                blocks = blocks_of_pass(rows, places, kv_block_bytes(self._spec))
            self._moves[micro_batch] = known = (segments, _Moves([(*run,) for run in runs.tolist()], blocks))
        return known[1]

    def close(self) -> None:
        self._slabs, self._device_slabs, self._tails, self._recent = [], [], None, {}
        self._host_slots = self._device_slots = None
        for buffer in self._buffers:
            buffer.close()
        if self.file is not None:
            self.file.close()


def _nothing() -> None:
    """The part of a step that moves nothing: no group of compressed KV is complete yet."""


def pieces(slab: Tensor, start: int, stop: int) -> list[Tensor]:
    """Tokens ``[start, stop)`` of a slab as contiguous tensors: its planes, or all in one; or its records."""
    if slab.dim() == 2:
        return [slab[start:stop]]
    rows = slab[:, start:stop]
    return [rows.transpose(0, 1)] if slab.stride(0) < slab.stride(1) else [*rows]
