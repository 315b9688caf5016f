"""Memory places with hard byte budgets: a tier that would exceed its budget raises before it allocates."""

from __future__ import annotations

import mmap
import threading

import torch

from flexrun.core import PAGE_BYTES, Tier, align_up, format_bytes
from flexrun.errors import BudgetError

_MADV_POPULATE_WRITE = 23  # Linux 5.14; not yet named in the mmap module
_FLAG = {Tier.GPU: "--gpu-memory", Tier.CPU: "--cpu-memory", Tier.DISK: "--disk-dir"}


class MemoryTier:
    """One tier's account. ``limit_bytes`` None means unlimited; ``peak_bytes`` is the most ever held."""

    def __init__(self, tier: Tier, limit_bytes: int | None):
        self.tier = tier
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
        """A page-aligned buffer of this tier. ``touch`` maps its pages now, so that no lane faults on them later."""
        nbytes = align_up(max(nbytes, 1))
        self.reserve(kind, nbytes)
        return Buffer(self, kind, nbytes, touch)


class Buffer:
    """Page-aligned anonymous memory (uint8 tensor ``data`` of ``nbytes``), counted until it is closed.

    The emulated accelerator's memory is host memory too: what makes it another tier is its budget, and
    that bytes only enter and leave it by copies.
    """

    def __init__(self, tier: MemoryTier | None, kind: str, nbytes: int, touch: bool):
        self._tier, self._kind, self.nbytes = tier, kind, nbytes
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if nbytes >= 4 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)
        if touch:
            self._populate()

    def _populate(self) -> None:
        try:
            self._map.madvise(_MADV_POPULATE_WRITE)
        except OSError:  # a kernel before 5.14
            self.data[::PAGE_BYTES] = 0

    @classmethod
    def outside_budget(cls, nbytes: int) -> Buffer:
        """Scratch memory while weights load, before the run's own buffers are filled."""
        return cls(None, "scratch", align_up(nbytes), False)

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over bytes ``[offset, ...)`` of the buffer, which it keeps alive."""
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        return self.data[offset : offset + nbytes].view(dtype).view(shape)

    def close(self) -> None:
        """Give the bytes back to the budget. The memory itself goes when the last view of it does."""
        if self._map is not None:
            if self._tier is not None:
                self._tier.release(self._kind, self.nbytes)
            self._map = self.data = None
