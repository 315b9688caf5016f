"""Disk past the page cache: O_DIRECT blocks from and to page-aligned memory, buffered where a file system refuses.

A page cache between the disk and the arena would be a hidden fourth tier and costs ten times the CPU time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from flexrun.core import PAGE_BYTES, align_up
from flexrun.errors import ExecutionError

BLOCK_BYTES = 4 << 20  # of a request, at most
O_DIRECT = getattr(os, "O_DIRECT", 0)
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)  # what refusing O_TMPFILE looks like
_NAMELESS = ".flexrun-nameless-"


@dataclass(frozen=True, slots=True)
class Block:
    """One request: ``nbytes`` at ``offset`` of ``file`` to or from ``address`` in memory (all page-aligned)."""

    file: DirectFile
    offset: int
    nbytes: int
    address: int

    def read(self) -> None:
        self.file.read_into(self.address, self.offset, self.nbytes)

    def write(self) -> None:
        self.file.write_from(self.address, self.offset, self.nbytes)


class DirectFile:
    """A file opened for direct reads. ``direct`` says whether O_DIRECT is in force; ``path`` of one without a name is
    its folder.

    hint: what to do where the file turns out shorter than it should be.
    """

    def __init__(
        self,
        path: Path,
        *,
        direct: bool = True,
        hint: str = "the packed cache is damaged; delete its folder and run again",
    ):
        self._take(path, str(path), _open_for_reading(path), direct, hint)

    @classmethod
    def nameless(cls, folder: Path, nbytes: int, *, what: str = "scratch file", direct: bool = True) -> DirectFile:
        """A new file of ``nbytes`` zeros in ``folder`` to read and write; it has no name and ends with the process.

        Its space is taken at once. ``what`` names it in errors. Raises OSError where the folder or its disk cannot
        give it.
        """
        descriptor = _open_nameless(Path(folder))
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except BaseException:
            os.close(descriptor)
            raise
        file = cls.__new__(cls)
        file._take(folder, f"{what} in {folder}", descriptor, direct, "check the disk")
        return file

    def _take(self, path: Path, name: str, descriptor: int, direct: bool, hint: str) -> None:
        self.path, self._name, self._descriptor, self._hint = Path(path), name, descriptor, hint
        self.direct = direct and bool(O_DIRECT) and self._set_direct(True)

    def _set_direct(self, wanted: bool) -> bool:
        """Turn O_DIRECT on or off, also for requests of other threads; False where the file system refuses."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | O_DIRECT if wanted else flags & ~O_DIRECT)
        except OSError:
            return False
        return True

    def read_into(self, address: int, offset: int, nbytes: int) -> None:
        """Fill ``nbytes`` at ``address``, without the interpreter lock. Raises ExecutionError on error or early end."""
        self._move("read", os.preadv, address, offset, nbytes)

    def write_from(self, address: int, offset: int, nbytes: int) -> None:
        """Write ``nbytes`` at ``address``, without the interpreter lock. Raises ExecutionError on error."""
        self._move("write", os.pwritev, address, offset, nbytes)

    def _move(self, what: str, call: Callable[..., int], address: int, offset: int, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            window = (ctypes.c_char * (nbytes - done)).from_address(address + done)
            was_direct = self.direct
            try:
                count = call(self._descriptor, [window], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and was_direct:  # found out only now that it has no direct access
                    self._set_direct(False)
                    self.direct = False
                    continue
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # where a file system gives room only as it is used
                raise ExecutionError(
                    f"{self._name}: {what} of {nbytes} bytes at {offset} failed: {error.strerror}",
                    "free some space, or give --disk-dir a folder on a larger disk" if full else "check the disk",
                ) from error
            if count == 0:
                raise ExecutionError(
                    f"{self._name}: short {what}, {done} of {nbytes} bytes at offset {offset}", self._hint
                )
            done += count
        if not self.direct and what == "read":  # keep the page cache from becoming a tier of its own
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open_for_reading(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ExecutionError(f"cannot open {path}: {error.strerror}", "check the disk and the path") from error


def _open_nameless(folder: Path) -> int:
    """Descriptor of a file that no folder lists, so that it goes however the process ends."""
    flags = os.O_RDWR | os.O_CLOEXEC
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, flags | os.O_TMPFILE | os.O_EXCL, 0o600)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
    for stale in folder.glob(f"{_NAMELESS}*"):  # left, empty, by a process that was killed between the next two calls
        with contextlib.suppress(FileNotFoundError):
            stale.unlink()
    descriptor, path = tempfile.mkstemp(prefix=_NAMELESS, dir=folder)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return descriptor


def blocks_of(file: DirectFile, offset: int, nbytes: int, target: torch.Tensor) -> list[Block]:
    """Split one tensor's read into blocks of equal size. ``target``: uint8, page-aligned, at least the padded size."""
    padded = align_up(nbytes)
    if target.numel() < padded or target.data_ptr() % PAGE_BYTES:
        raise ExecutionError("direct read into memory that is too small or not page-aligned")
    address = target.data_ptr()
    count = max(-(-padded // BLOCK_BYTES), 1)
    size = max(align_up(-(-padded // count)), PAGE_BYTES)
    return [Block(file, offset + start, min(size, padded - start), address + start) for start in range(0, padded, size)]


class RowFile:
    """Rows of a table on disk (an embedding): few, small and scattered, so read through the page cache."""

    def __init__(self, path: Path, offset: int, row_bytes: int):
        """Raises ExecutionError where the file cannot be opened."""
        self.path, self._offset, self.row_bytes = Path(path), offset, row_bytes
        self._descriptor = _open_for_reading(path)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read_rows(self, rows: list[int], target: torch.Tensor) -> None:
        """Row ``rows[n]`` to ``target[n]`` (uint8 [>= len(rows), row_bytes]).

        Raises ExecutionError on an error or a short read.
        """
        view = memoryview(target.numpy()).cast("B")
        for row in rows if len(rows) > 1 else ():  # those that the page cache lacks are then read all at once
            start = self._offset + row * self.row_bytes
            os.posix_fadvise(self._descriptor, start, self.row_bytes, os.POSIX_FADV_WILLNEED)
        for place, row in enumerate(rows):
            window = view[place * self.row_bytes : (place + 1) * self.row_bytes]
            try:
                count = os.preadv(self._descriptor, [window], self._offset + row * self.row_bytes)
            except OSError as error:
                raise ExecutionError(
                    f"{self.path}: read of row {row} failed: {error.strerror}", "check the disk"
                ) from error
            if count != self.row_bytes:
                raise ExecutionError(
                    f"{self.path}: short read of row {row}", "the packed cache is damaged; delete its folder"
                )

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
