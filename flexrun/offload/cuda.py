"""A CUDA GPU as the accelerator: budgeted memory, pinned host memory, and a stream a lane.

Lanes wait for each other by events alone. Nothing here waits for the whole device while a pass runs, and the buffers
of a run are allocated before its first pass; what torch's operators take inside a pass comes from torch's caching
allocator, on the compute lane's stream only, out of the workspace of the budget. Every buffer that two streams share
lives as long as the run, so no tensor needs record_stream.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from flexrun.core import Lane, format_bytes
from flexrun.errors import BudgetError, ConfigError
from flexrun.offload.device import EmulatedDevice, Queue
from flexrun.offload.tiers import Buffer, Pages

LIBRARY_BYTES = 256 << 20  # of the budget: cuBLAS's workspace, tables of a pass, and the allocator's rounding
REGISTER_BYTES = 256 << 30  # one call of cudaHostRegister fails from 512 GiB on
COPIES_AHEAD = 2  # chunks of weights enqueued but not copied yet
SCRATCH_BYTES = 16 << 20  # pinned rows on their way to host slabs
NEW_ANCHOR_SECONDS = 10.0  # event times are float32 milliseconds: they are measured over short spans


class CudaMemory:
    """Takes device memory from torch's caching allocator, one block a buffer."""

    def __init__(self, place: torch.device):
        self._place = place

    def take(self, nbytes: int, touch: bool) -> CudaBytes:
        return CudaBytes(torch.empty(nbytes, dtype=torch.uint8, device=self._place))


class CudaBytes:
    """A block of device memory."""

    def __init__(self, data: Tensor):
        self.data = data

    def close(self) -> None:
        self.data = None


class PinnedMemory:
    """Takes host pages that the GPU reads and writes at the full speed of the link."""

    def take(self, nbytes: int, touch: bool) -> PinnedPages:
        return PinnedPages(nbytes)


class PinnedPages(Pages):
    """Host pages registered with CUDA as they are; torch's own pinned blocks would be rounded up to a power of two."""

    def __init__(self, nbytes: int):
        super().__init__(nbytes, touch=True)
        self._registered: list[int] = []
        address = self.data.data_ptr()
        for start in range(0, nbytes, REGISTER_BYTES):
            length = min(REGISTER_BYTES, nbytes - start)
            code = int(torch.cuda.cudart().cudaHostRegister(address + start, length, 0))
            if code:
                self.close()
                raise MemoryError(f"cudaHostRegister of {format_bytes(length)} failed with code {code}")
            self._registered.append(address + start)

    def close(self) -> None:
        """Unpins the pages; nothing may be copying to or from them."""
        while self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered.pop())
        super().close()

    def __del__(self):
        """An engine that could not be opened leaves pages to the garbage collector: unpin them before they go."""
        while self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered.pop())


class CudaQueue(Queue):
    """A CUDA stream. ``ahead``: most marks of ``bound`` that the host may be ahead of the device (None: any)."""

    def __init__(self, place: torch.device, ahead: int | None):
        self._stream = torch.cuda.Stream(place)
        self._ahead, self._bounds = ahead, deque()
        with self.active():
            self._anchor = self.mark()
        self._anchor.synchronize()
        self._anchor_seconds = time.perf_counter()

    def active(self) -> AbstractContextManager:
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event:
        """A new event each time: one that is recorded anew would hold up whoever still waits for its old place."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self._stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)

    def bound(self) -> None:
        """Called behind each large copy: waits, asleep, while too many of them are under way."""
        if self._ahead is None:
            return
        self._bounds.append(self.mark())
        while len(self._bounds) > self._ahead:
            self._bounds.popleft().synchronize()

    def seconds_of(self, mark: torch.cuda.Event) -> float:
        elapsed = self._anchor.elapsed_time(mark) / 1000
        seconds = self._anchor_seconds + elapsed
        if elapsed > NEW_ANCHOR_SECONDS:
            self._anchor, self._anchor_seconds = mark, seconds
        return seconds


class CudaDevice(EmulatedDevice):
    """One GPU, held to ``budget_bytes`` of memory.

    The tiers count every buffer against the budget before it is allocated; torch's allocator refuses to hold more
    than the budget, whatever asks. The CUDA context (some 0.5 GB) is outside it.
    """

    def __init__(self, budget_bytes: int, index: int | None = None):
        require_cuda()
        self.place = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.place)
        if budget_bytes > free_bytes:
            raise BudgetError(
                f"--gpu-memory is {format_bytes(budget_bytes)}, but {self.place} has {format_bytes(free_bytes)} free",
                f"give at most {format_bytes(0.9 * free_bytes)}, or stop what else uses the GPU",
            )
        torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total_bytes, 1.0), self.place)
        self.memory, self.host_memory = CudaMemory(self.place), PinnedMemory()
        self._queues: dict[tuple[Lane, bool], CudaQueue] = {}
        self._tables: dict[str, tuple[Tensor, Buffer]] = {}
        self._scratch: Buffer | None = None

    def queue(self, lane: Lane, *, bulk: bool = False) -> CudaQueue | None:
        if lane not in (Lane.GPU, Lane.H2D, Lane.D2H):
            return None
        if (lane, bulk) not in self._queues:
            self._queues[lane, bulk] = CudaQueue(self.place, COPIES_AHEAD if bulk else None)
        return self._queues[lane, bulk]

    def upload(self, name: str, values: Tensor) -> Tensor:
        """See EmulatedDevice. Goes through pinned memory; the pass before must be over (``Executor.run``)."""
        nbytes = values.numel() * values.itemsize
        if name not in self._tables or self._tables[name][1].nbytes < nbytes:
            self._grow(name, nbytes)
        device, pinned = self._tables[name]
        source = pinned.view(0, tuple(values.shape), values.dtype)
        source.copy_(values)
        target = device[:nbytes].view(values.dtype).view(values.shape)
        target.copy_(source, non_blocking=True)
        return target

    def _grow(self, name: str, nbytes: int) -> None:
        """Room for twice as much: a few passes into a run, no table grows any more."""
        if name in self._tables:
            self._tables.pop(name)[1].close()
        pinned = Buffer.outside_budget(max(2 * nbytes, 1), self.host_memory)
        self._tables[name] = torch.empty(pinned.nbytes, dtype=torch.uint8, device=self.place), pinned

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def landed(self) -> None:
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()
        arrived.synchronize()

    def rows_on_host(self, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """See EmulatedDevice. Down through pinned scratch memory; for the thread of one lane."""
        if self._scratch is None:
            self._scratch = Buffer.outside_budget(SCRATCH_BYTES, self.host_memory)
        shape, dtype = tensors[0].shape[1:], tensors[0].dtype
        row_bytes = shape.numel() * dtype.itemsize
        most = SCRATCH_BYTES // (len(tensors) * row_bytes)
        for start in range(0, len(tensors[0]), most):
            rows = slice(start, min(start + most, len(tensors[0])))
            count = rows.stop - start
            copies = [
                self._scratch.view(place * most * row_bytes, (count, *shape), dtype) for place in range(len(tensors))
            ]
            for copy, tensor in zip(copies, tensors):
                copy.copy_(tensor[rows], non_blocking=True)
            self.landed()
            yield rows, copies

    def settle(self) -> None:
        torch.cuda.synchronize(self.place)

    def close(self) -> None:
        self.settle()
        for _, pinned in self._tables.values():
            pinned.close()
        self._tables = {}
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, self.place)


def require_cuda() -> None:
    """Raises ConfigError where torch finds no CUDA GPU."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "device='cuda' needs a CUDA GPU, and torch finds none",
            "install a CUDA build of torch and check nvidia-smi; or use device='cpu', where gpu_memory emulates one",
        )


def default_budget_bytes() -> int:
    """What ``--gpu-memory`` is where none is given: 90 % of the GPU memory that is free."""
    require_cuda()
    return int(0.9 * torch.cuda.mem_get_info()[0])
