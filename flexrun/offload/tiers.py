"""Memory places with hard byte budgets: a tier that would exceed its budget raises before it allocates."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from flexrun.core import PAGE_BYTES, Tier, align_up, format_bytes
from flexrun.errors import BudgetError

_MADV_POPULATE_WRITE = 23  # Linux 5.14; not yet named in the mmap module
_TOUCH_BYTES = 256 << 20  # pages are mapped in pieces of this size, by several threads
_TOUCH_THREADS = 4
_FLAG = {Tier.GPU: "--gpu-memory", Tier.CPU: "--cpu-memory", Tier.DISK: "--disk-memory"}


class Held(Protocol):
    """Memory in one piece: uint8 tensor ``data``."""

    data: torch.Tensor

    def close(self) -> None:
        """Let go of it."""


class HostMemory:
    """Takes anonymous pages of host RAM."""

    def take(self, nbytes: int, touch: bool) -> Held:
        """Raises MemoryError or OSError (ENOMEM) where the machine has none left."""
        return Pages(nbytes, touch)


class Pages:
    """Page-aligned anonymous memory, in huge pages where it is large. It goes when the last view of it does."""

    def __init__(self, nbytes: int, touch: bool):
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if nbytes >= 4 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)
        if touch:
            self._populate()

    def _populate(self) -> None:
        """Map every page now, a large piece by several threads: first touches run at about 1 GB/s a thread."""
        if len(self.data) <= _TOUCH_BYTES:
            self._populate_piece(0)
            return
        with ThreadPoolExecutor(_TOUCH_THREADS) as pool:
            list(pool.map(self._populate_piece, range(0, len(self.data), _TOUCH_BYTES)))

    def _populate_piece(self, start: int) -> None:
        nbytes = min(_TOUCH_BYTES, len(self.data) - start)
        if _madvise(self.data.data_ptr() + start, nbytes, _MADV_POPULATE_WRITE) == 0:
            return
        if ctypes.get_errno() != errno.EINVAL:  # EINVAL: a kernel before 5.14
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.data[start : start + nbytes : PAGE_BYTES] = 0

    def close(self) -> None:
        self._map = self.data = None


def _madvise(address: int, nbytes: int, advice: int) -> int:
    """The C function, without the interpreter lock, which ``mmap.madvise`` keeps. 0, or -1 with errno set."""
    return _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice)


_libc = ctypes.CDLL(None, use_errno=True)


class MemoryTier:
    """One tier's account. ``limit_bytes`` None means unlimited; ``peak_bytes`` is the most ever held.

    memory: where its bytes come from.
    """

    def __init__(self, tier: Tier, limit_bytes: int | None, memory: HostMemory | None = None):
        self.tier = tier
        self.memory = memory or HostMemory()
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self.used_by_kind: dict[str, int] = {}
        self._lock = threading.Lock()

    def reserve(self, kind: str, nbytes: int) -> None:
        """Count ``nbytes`` as held. Raises BudgetError, holding nothing, where they do not fit."""
        with self._lock:
            if self.limit_bytes is not None and self.used_bytes + nbytes > self.limit_bytes:
                raise BudgetError(
                    f"{self.tier.value} tier: {kind} needs {format_bytes(nbytes)}, but {format_bytes(self.used_bytes)} "
                    f"of its {format_bytes(self.limit_bytes)} budget are in use",
                    f"raise {_FLAG[self.tier]}, lower --max-num-seqs, or place less on this tier",
                )
            self.used_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            self.used_by_kind[kind] = self.used_by_kind.get(kind, 0) + nbytes

    def release(self, kind: str, nbytes: int) -> None:
        with self._lock:
            self.used_bytes -= nbytes
            self.used_by_kind[kind] -= nbytes

    def allocate(self, kind: str, nbytes: int, *, touch: bool = False) -> Buffer:
        """A page-aligned buffer of this tier. ``touch`` maps its pages now, so that no lane faults on them later.

        Raises BudgetError where the budget or the machine has no room for it.
        """
        nbytes = align_up(max(nbytes, 1))
        self.reserve(kind, nbytes)
        try:
            return Buffer(self, kind, nbytes, self.memory.take(nbytes, touch))
        except BaseException as error:
            self.release(kind, nbytes)
            if isinstance(error, (MemoryError, OSError, torch.OutOfMemoryError)):
                raise BudgetError(
                    f"{self.tier.value} tier: the machine refuses {format_bytes(nbytes)} for {kind} ({error})",
                    f"lower {_FLAG[self.tier]} to what is free, or stop what else uses this memory",
                ) from error
            raise


class Buffer:
    """One page-aligned piece of a tier's memory (uint8 tensor ``data`` of ``nbytes``), counted until it is closed."""

    def __init__(self, tier: MemoryTier | None, kind: str, nbytes: int, held: Held):
        self._tier, self._kind, self.nbytes, self._held = tier, kind, nbytes, held
        self.data = held.data

    @classmethod
    def outside_budget(cls, nbytes: int, memory: HostMemory | None = None) -> Buffer:
        """Scratch memory while weights load, before the run's own buffers are filled."""
        nbytes = align_up(nbytes)
        return cls(None, "scratch", nbytes, (memory or HostMemory()).take(nbytes, False))

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over bytes ``[offset, ...)`` of the buffer, which it keeps alive."""
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        return self.data[offset : offset + nbytes].view(dtype).view(shape)

    def close(self) -> None:
        """Give the bytes back to the budget. The memory itself goes when the last view of it does."""
        if self._held is not None:
            if self._tier is not None:
                self._tier.release(self._kind, self.nbytes)
            self.data = None
            self._held.close()
            self._held = None
