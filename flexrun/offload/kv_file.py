"""KV that lives on disk: one file without a name for all its slabs, and the pages of a slab that a pass moves.

A staging slot holds a slab's image, byte for byte, so that a page of the file is a page of the slot. Sequences that
are not in a pass may share a page with rows that are written; such a page is read, patched and written back.
"""

from __future__ import annotations

import ctypes
import errno
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy

from flexrun.core import PAGE_BYTES, Tier, align_up, format_bytes
from flexrun.disk_io import DirectFile
from flexrun.errors import BudgetError, ConfigError
from flexrun.offload.tiers import Buffer, MemoryTier

GAP_BYTES = 64 << 10  # reading on over a gap this small takes no longer than another request
REQUEST_BYTES = 2 << 20  # at most: two of them in flight fill an SSD, and small writes wait less long behind them
PARTS = 8  # small requests of a step are dealt out in about so many parts, enough for the threads of a lane
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Request = tuple[int, int]  # (offset in the slab, bytes), whole pages


@dataclass(frozen=True)
class Pages:
    """What a pass moves of every layer's slab of one micro-batch.

    reads, writes: requests, grouped into the parts that threads take. patches: pages that are written but also hold
    rows of sequences outside the pass, each with the byte ranges of the slab in it that are new.
    """

    reads: list[list[Request]]
    writes: list[list[Request]]
    patches: list[tuple[int, list[tuple[int, int]]]]


def pages_of(cached: numpy.ndarray, new: numpy.ndarray, absent: numpy.ndarray) -> Pages:
    """The pages to move for byte ranges of a slab, each int64 [ranges, 2] of (start, stop).

    cached: rows that earlier passes left and this one reads. new: rows it adds. absent: room of sequences that
    it does not touch.
    """
    reads, writes = cover(cached, PAGE_BYTES, GAP_BYTES), cover(new, PAGE_BYTES)
    edges = {int(edge) // PAGE_BYTES * PAGE_BYTES for edge in absent.ravel() if edge % PAGE_BYTES}
    patches = []
    for page in sorted(edges):
        inside = numpy.clip(new, page, page + PAGE_BYTES)
        inside = inside[inside[:, 0] < inside[:, 1]]
        if len(inside):
            patches.append((page, [(start, stop) for start, stop in inside.tolist()]))
            writes = _without(writes, page)
    return Pages(_grouped(reads), _grouped(writes), patches)


def cover(ranges: numpy.ndarray, unit: int, gap: int = 0) -> numpy.ndarray:
    """Ranges widened to multiples of ``unit``, sorted and merged across gaps of at most ``gap``: int64 [ranges, 2]."""
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    if not len(ranges):
        return ranges
    ranges = ranges[numpy.argsort(ranges[:, 0], kind="stable")]
    starts = ranges[:, 0] // unit * unit
    stops = numpy.maximum.accumulate(-(-ranges[:, 1] // unit) * unit)
    begins = numpy.flatnonzero(numpy.concatenate(([True], starts[1:] > stops[:-1] + gap)))
    return numpy.stack([starts[begins], stops[numpy.append(begins[1:], len(ranges)) - 1]], axis=1)


def _without(ranges: numpy.ndarray, page: int) -> numpy.ndarray:
    parts = []
    for start, stop in ranges.tolist():
        pieces = ((start, min(stop, page)), (max(start, page + PAGE_BYTES), stop))
        parts += [piece for piece in pieces if piece[0] < piece[1]]
    return numpy.array(parts, dtype=numpy.int64).reshape(-1, 2)


def _grouped(ranges: numpy.ndarray) -> list[list[Request]]:
    """Requests of at most REQUEST_BYTES each, neighbours together in parts of about equal bytes."""
    requests = [
        (offset, min(REQUEST_BYTES, stop - offset))
        for start, stop in ranges.tolist()
        for offset in range(start, stop, REQUEST_BYTES)
    ]
    part_bytes = sum(nbytes for _, nbytes in requests) / PARTS
    groups, filled = [], part_bytes
    for request in requests:
        if filled >= part_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(request)
        filled += request[1]
    return groups


class KVFile:
    """``slabs`` slabs of ``slab_bytes`` (whole pages) in ``folder``; gone with the process, however that ends.

    read_bytes, written_bytes: what has really moved.
    Raises BudgetError where ``tier`` or the disk is too small, ConfigError where nothing can be written.
    """

    def __init__(self, folder: Path, slab_bytes: int, slabs: int, tier: MemoryTier, *, direct: bool = True):
        self.slab_bytes = align_up(slab_bytes)
        self.nbytes = self.slab_bytes * slabs
        self.read_bytes = self.written_bytes = 0
        self._count_lock = threading.Lock()
        self._tier = tier
        tier.reserve("kv", self.nbytes)
        try:
            self._file = _open(Path(folder), self.nbytes, direct)
        except BaseException:
            tier.release("kv", self.nbytes)
            raise

    @property
    def direct(self) -> bool:
        return self._file.direct

    def read_parts(self, slab: int, pages: Pages, address: int) -> list[Callable[[], None]]:
        """Bring what a pass needs of a slab to its image at ``address``."""
        return [partial(self._read, slab, part, address) for part in pages.reads]

    def write_parts(self, slab: int, pages: Pages, address: int) -> list[Callable[[], None]]:
        """Write what a pass adds to a slab out of its image at ``address``."""
        parts = [partial(self._write, slab, part, address) for part in pages.writes]
        return parts + [partial(self._patch, slab, page, new, address) for page, new in pages.patches]

    def _read(self, slab: int, requests: list[Request], address: int) -> None:
        for offset, nbytes in requests:
            self._file.read_into(address + offset, slab * self.slab_bytes + offset, nbytes)
        self._count(read=sum(nbytes for _, nbytes in requests))

    def _write(self, slab: int, requests: list[Request], address: int) -> None:
        for offset, nbytes in requests:
            self._file.write_from(address + offset, slab * self.slab_bytes + offset, nbytes)
        self._count(written=sum(nbytes for _, nbytes in requests))

    def _patch(self, slab: int, page: int, new: list[tuple[int, int]], address: int) -> None:
        patched = Buffer.outside_budget(PAGE_BYTES)
        place, offset = patched.data.data_ptr(), slab * self.slab_bytes + page
        self._file.read_into(place, offset, PAGE_BYTES)
        for start, stop in new:
            ctypes.memmove(place + start - page, address + start, stop - start)
        self._file.write_from(place, offset, PAGE_BYTES)
        self._count(read=PAGE_BYTES, written=PAGE_BYTES)

    def _count(self, read: int = 0, written: int = 0) -> None:
        with self._count_lock:
            self.read_bytes += read
            self.written_bytes += written

    def close(self) -> None:
        """Give the space back. Safe to call twice."""
        if self._tier is not None:
            self._file.close()
            self._tier.release("kv", self.nbytes)
            self._tier = None


def _open(folder: Path, nbytes: int, direct: bool) -> DirectFile:
    what = "KV cache"
    try:
        free_bytes = shutil.disk_usage(folder).free
        if nbytes > free_bytes:
            raise OSError(errno.ENOSPC, "the disk is full")
        return DirectFile.nameless(folder, nbytes, what=what, direct=direct)
    except OSError as error:
        if error.errno in _FULL:
            raise BudgetError(
                f"{Tier.DISK.value} tier: {what} needs {format_bytes(nbytes)} in {folder}, which has "
                f"{format_bytes(free_bytes)} free ({error.strerror})",
                "give --disk-dir a folder on a larger disk, lower --max-num-seqs, or place less KV on disk",
            ) from error
        raise ConfigError(
            f"{folder}: cannot keep {what} there: {error.strerror}", "give --disk-dir a folder that can be written"
        ) from error
