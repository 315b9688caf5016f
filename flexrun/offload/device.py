"""The accelerator behind one interface: here the emulated one, in host memory; offload.cuda has the GPU.

Both have memory of their own budget, and lanes whose copies cross its border. The emulated one does a step on its
lane's thread, to the end. A GPU has a queue a lane, on which a step is put and passed by a mark when it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from flexrun.core import Lane
from flexrun.offload.tiers import HostMemory


class Mark(Protocol):
    """A place in a queue (a CUDA event)."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Wait, asleep, until the device has passed it."""


class Queue(Protocol):
    """Work for a device, done in order (a CUDA stream)."""

    def active(self) -> AbstractContextManager:
        """Work of the calling thread goes on this queue meanwhile."""

    def mark(self) -> Mark:
        """A mark behind everything enqueued so far."""

    def wait(self, mark: Mark) -> None:
        """What is enqueued from now on starts only after ``mark``; the host does not wait."""

    def bound(self) -> None:
        """Behind a large copy: wait, asleep, while too many of them are enqueued and not done."""

    def seconds_of(self, mark: Mark) -> float:
        """When a mark was passed, on the clock of ``time.perf_counter``."""


class EmulatedDevice:
    """An accelerator whose memory is host RAM under another budget, and whose copies are memcpys of lane threads.

    place: the torch device of its tensors. memory, host_memory: where its tier and the host's take their bytes from.
    """

    place = torch.device("cpu")

    def __init__(self):
        self.memory = self.host_memory = HostMemory()

    @property
    def is_separate(self) -> bool:
        """Whether host code cannot touch its tensors, so that bytes reach them by ``copy`` alone."""
        return self.place.type != "cpu"

    def queue(self, lane: Lane, *, bulk: bool = False) -> Queue | None:
        """The queue of a lane, None where its thread does the work itself. bulk: large copies, which may not run far
        ahead of the device lest small ones wait behind them on the link."""
        return None

    def upload(self, name: str, values: Tensor) -> Tensor:
        """A small table of a pass on the device; ``name`` says which, and its last values are then overwritten."""
        return values

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy between this device and the host on the calling thread's queue; both contiguous, of equal bytes."""
        target.copy_(source)

    def landed(self) -> None:
        """Wait, asleep, until what ``copy`` put on the calling thread's queue has arrived."""

    def rows_on_host(self, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """(rows, those rows of each tensor where the host can read them) until all rows of the tensors were given.

        tensors: [rows, ...], of equal length and row bytes. What is given lasts until the next is asked for.
        """
        yield slice(0, len(tensors[0])), list(tensors)

    def settle(self) -> None:
        """Wait until nothing is under way on the device. For the start and the end of a run only."""

    def close(self) -> None:
        """Give back what the device holds beside the tiers' buffers."""
