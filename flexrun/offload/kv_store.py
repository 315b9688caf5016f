"""The KV cache: one slab a (layer, attention micro-batch), in which every sequence owns a contiguous run of tokens.

Slabs are token-major, [2, tokens, kv_heads, head_dim]: ragged sequences lie side by side without padding, and
what is in use of a slab moves as few large copies.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from torch import Tensor

from flexrun.core import DTYPES, Lane, Tier, align_up
from flexrun.models.spec import ModelSpec
from flexrun.offload.tiers import Buffer, MemoryTier
from flexrun.placement import KV_SLOTS, KVMicroBatch


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


class KVStore:
    """Slabs for every layer of every micro-batch, in the memory of each micro-batch's home tier."""

    def __init__(
        self, spec: ModelSpec, micro_batches: tuple[KVMicroBatch, ...], host: MemoryTier, device: MemoryTier | None
    ):
        self.micro_batches = micro_batches
        self._spec = spec
        self._dtype = DTYPES[spec.dtype]
        self._spaces = [TokenSpace(micro_batch.capacity_tokens) for micro_batch in micro_batches]
        self.sequences = [0] * len(micro_batches)  # regions in use
        self._buffers: list[Buffer] = []
        self._slabs: list[list[Tensor]] = []
        layer_bytes = spec.kv_elements_per_token * self._dtype.itemsize
        for micro_batch in micro_batches:
            memory = device if micro_batch.home is Tier.GPU else host
            slab_bytes = micro_batch.capacity_tokens * layer_bytes
            buffer = memory.allocate("kv", slab_bytes * spec.num_layers, touch=True)
            self._buffers.append(buffer)
            self._slabs.append(
                [self._view(buffer, layer * slab_bytes, micro_batch) for layer in range(spec.num_layers)]
            )
        self._staging: list[Tensor] = []
        staged = [mb for mb in micro_batches if mb.home is Tier.CPU and mb.attend_lane is Lane.GPU]
        if staged:
            slot_bytes = align_up(staged[0].capacity_tokens * layer_bytes)
            buffer = device.allocate("kv_staging", KV_SLOTS * slot_bytes, touch=True)
            self._buffers.append(buffer)
            self._staging = [self._view(buffer, slot * slot_bytes, staged[0]) for slot in range(KV_SLOTS)]

    def _view(self, buffer: Buffer, offset: int, micro_batch: KVMicroBatch) -> Tensor:
        shape = (2, micro_batch.capacity_tokens, self._spec.num_kv_heads, self._spec.head_dim)
        return buffer.view(offset, shape, self._dtype)

    def allocate(self, tokens: int, max_sequences: int) -> Region | None:
        """Room for a sequence of ``tokens`` in the emptiest micro-batch that has it, or None for now.

        ``max_sequences``: most sequences one micro-batch may hold.
        """
        order = sorted(
            (index for index, count in enumerate(self.sequences) if count < max_sequences),
            key=lambda index: (self.sequences[index], -self._spaces[index].free_tokens, index),
        )
        for index in order:
            start = self._spaces[index].allocate(tokens)
            if start is not None:
                self.sequences[index] += 1
                return Region(index, start, tokens)
        return None

    def release(self, region: Region) -> None:
        self._spaces[region.micro_batch].release(region.start, region.capacity)
        self.sequences[region.micro_batch] -= 1

    @property
    def largest_sequence_tokens(self) -> int:
        """Tokens of the longest sequence that could ever fit."""
        return max(micro_batch.capacity_tokens for micro_batch in self.micro_batches)

    def slab(self, layer: int, micro_batch: int) -> Tensor:
        """[2, tokens, kv_heads, head_dim] in the micro-batch's home tier."""
        return self._slabs[micro_batch][layer]

    def staging(self, slot: int) -> Tensor:
        """[2, tokens, kv_heads, head_dim] on the device, for host-resident KV that is attended there."""
        return self._staging[slot]

    def close(self) -> None:
        self._slabs, self._staging = [], []
        for buffer in self._buffers:
            buffer.close()
