"""Reads from disk past the page cache: O_DIRECT blocks into page-aligned memory, buffered where a file system refuses.

A page cache between the disk and the arena would be a hidden fourth tier and costs ten times the CPU time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from flexrun.core import PAGE_BYTES, align_up
from flexrun.errors import ExecutionError

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """One request: ``nbytes`` at ``offset`` of ``file`` to ``address`` in memory (all page-aligned)."""

    file: DirectFile
    offset: int
    nbytes: int
    address: int

    def read(self) -> None:
        self.file.read_into(self.address, self.offset, self.nbytes)


class DirectFile:
    """A file opened for direct reads. ``direct`` says whether O_DIRECT is in force."""

    def __init__(self, path: Path, *, direct: bool = True):
        self.path = Path(path)
        self.direct = direct and hasattr(os, "O_DIRECT")
        self._retired: list[int] = []  # descriptors that other threads may still be reading from
        self._reopen_lock = threading.Lock()
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | (os.O_DIRECT if self.direct else 0))
        except OSError as error:
            if not self.direct or error.errno != errno.EINVAL:
                raise ExecutionError(f"cannot open {path}: {error.strerror}", "check the disk and the path") from error
            self.direct = False
            self._descriptor = os.open(path, flags)

    def read_into(self, address: int, offset: int, nbytes: int) -> None:
        """Fill ``nbytes`` at ``address``, without the interpreter lock. Raises ExecutionError on error or early end."""
        done = 0
        while done < nbytes:
            window = (ctypes.c_char * (nbytes - done)).from_address(address + done)
            descriptor = self._descriptor
            try:
                count = os.preadv(descriptor, [window], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and self._replaced_by_buffered(descriptor):
                    continue
                raise ExecutionError(
                    f"{self.path}: read of {nbytes} bytes at {offset} failed: {error.strerror}", "check the disk"
                ) from error
            if count == 0:
                raise ExecutionError(
                    f"{self.path}: short read, {done} of {nbytes} bytes at offset {offset}",
                    "the packed cache is damaged; delete its folder and run again",
                )
            done += count
        if not self.direct:  # keep the page cache from becoming a tier of its own
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _replaced_by_buffered(self, descriptor: int) -> bool:
        """Fall back to buffered reads; True where ``descriptor`` is no longer the one in use."""
        with self._reopen_lock:
            if self.direct:
                self._retired.append(self._descriptor)
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                self.direct = False
            return descriptor != self._descriptor

    def close(self) -> None:
        while self._retired:
            os.close(self._retired.pop())
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def blocks_of(file: DirectFile, offset: int, nbytes: int, target: torch.Tensor) -> list[Block]:
    """Split one tensor's read into blocks. ``target``: uint8, page-aligned, at least the padded size."""
    padded = align_up(nbytes)
    if target.numel() < padded or target.data_ptr() % PAGE_BYTES:
        raise ExecutionError("direct read into memory that is too small or not page-aligned")
    address = target.data_ptr()
    return [
        Block(file, offset + start, min(BLOCK_BYTES, padded - start), address + start)
        for start in range(0, padded, BLOCK_BYTES)
    ]


class RowFile:
    """Rows of a table on disk (an embedding): few, small and scattered, so read through the page cache."""

    def __init__(self, path: Path, offset: int, row_bytes: int):
        self.path, self._offset, self.row_bytes = Path(path), offset, row_bytes
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read_rows(self, rows: list[int], target: torch.Tensor) -> None:
        """Row ``rows[n]`` to ``target[n]`` (uint8 [>= len(rows), row_bytes]). Raises ExecutionError on a short read."""
        view = memoryview(target.numpy()).cast("B")
        for place, row in enumerate(rows):
            window = view[place * self.row_bytes : (place + 1) * self.row_bytes]
            if os.preadv(self._descriptor, [window], self._offset + row * self.row_bytes) != self.row_bytes:
                raise ExecutionError(
                    f"{self.path}: short read of row {row}", "the packed cache is damaged; delete its folder"
                )

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
