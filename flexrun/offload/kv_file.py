"""KV that lives on disk: one file without a name for all its slabs, and the blocks of a slab that a pass moves.

A staging slot holds a slab's image, byte for byte, so that a block of the file is a block of the slot. Only whole
blocks are written: what a sequence has of its last one waits in RAM until that is full, for a disk takes nearly as long
to write a row as a block. A block in which one sequence ends and another begins is the other's: what the first has in
it never leaves RAM.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy

from flexrun.core import Tier, align_up, format_bytes
from flexrun.disk_io import DirectFile
from flexrun.errors import BudgetError, ConfigError
from flexrun.offload.tiers import MemoryTier

GAP_BYTES = 64 << 10  # reading on over a gap this small takes no longer than another request
REQUEST_BYTES = 2 << 20  # at most; whole blocks
PARTS = 8  # small requests of a step are dealt out in about so many parts, enough for the threads of a lane
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Request = tuple[int, int]  # (offset in the slab, bytes), whole blocks
Tail = tuple[int, int, int]  # (a sequence's place among the tails, start, stop): bytes of the slab, all in one block


@dataclass(frozen=True)
class Blocks:
    """What a pass moves of every layer's slab of one micro-batch.

    reads: requests, grouped into the parts that threads take, each with the tails that lie in them: to be put in when
    the requests are over. writes: the same without tails. cached, kept: tails that the pass needs and no request
    covers; tails that it leaves.
    """

    reads: list[tuple[list[Request], list[Tail]]]
    cached: list[Tail]
    writes: list[list[Request]]
    kept: list[Tail]


def blocks_of_pass(rows: numpy.ndarray, places: Sequence[int], block_bytes: int) -> Blocks:
    """The blocks to move for sequences of a slab. rows: int64 [sequences, 3], in bytes: where each begins, where what
    earlier passes left of it ends, where what this one adds ends. places: theirs among the tails."""
    start, cached, stop = rows.T
    written, full = cached // block_bytes * block_bytes, stop // block_bytes * block_bytes
    first = start // block_bytes * block_bytes
    reads = _grouped(cover(numpy.stack([first, written], axis=1), 1, GAP_BYTES))
    writes = _grouped(cover(numpy.stack([written, full], axis=1), 1))
    parts, alone = _among(reads, _tails(places, numpy.maximum(start, written), cached))
    return Blocks(parts, alone, writes, _tails(places, numpy.maximum(start, full), stop))


def _among(reads: list[list[Request]], tails: list[Tail]) -> tuple[list[tuple[list[Request], list[Tail]]], list[Tail]]:
    """Each part with the tails that lie in its requests, and those that lie in none."""
    parts, alone = [(requests, []) for requests in reads], []
    requests = [(*request, part) for part, within in enumerate(reads) for request in within]  # in the order of offsets
    offsets = [offset for offset, _, _ in requests]
    for tail in tails:
        before = bisect.bisect_right(offsets, tail[1]) - 1
        covered = before >= 0 and tail[1] < offsets[before] + requests[before][1]
        (parts[requests[before][2]][1] if covered else alone).append(tail)
    return parts, alone


def _tails(places: Sequence[int], starts: numpy.ndarray, stops: numpy.ndarray) -> list[Tail]:
    return [tail for tail in zip(places, starts.tolist(), stops.tolist()) if tail[1] < tail[2]]


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

    block_bytes: whole pages, of which REQUEST_BYTES is a multiple. read_bytes, written_bytes: what has really moved.
    Raises BudgetError where ``tier`` or the disk is too small, ConfigError where nothing can be written.
    """

    def __init__(
        self, folder: Path, slab_bytes: int, slabs: int, block_bytes: int, tier: MemoryTier, *, direct: bool = True
    ):
        self.slab_bytes, self._block_bytes = align_up(slab_bytes), block_bytes
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

    def read_parts(self, slab: int, blocks: Blocks, address: int, tails: int) -> list[Callable[[], None]]:
        """Bring what a pass needs of a slab to its image at ``address``; ``tails``: address of the slab's tails."""
        parts = [partial(self._read, slab, *part, address, tails) for part in blocks.reads]
        return parts + [partial(self._read, slab, [], blocks.cached, address, tails)] * bool(blocks.cached)

    def write_parts(self, slab: int, blocks: Blocks, address: int, tails: int) -> list[Callable[[], None]]:
        """Write what a pass fills of a slab out of its image at ``address``, and keep the rest."""
        parts = [partial(self._write, slab, part, address) for part in blocks.writes]
        return parts + [partial(self._keep, blocks.kept, address, tails)] * bool(blocks.kept)

    def _read(self, slab: int, requests: list[Request], there: list[Tail], address: int, tails: int) -> None:
        for offset, nbytes in requests:
            self._file.read_into(address + offset, slab * self.slab_bytes + offset, nbytes)
        for place, start, stop in there:
            ctypes.memmove(address + start, self._tail(tails, place, start), stop - start)
        self._count(read=sum(nbytes for _, nbytes in requests))

    def _write(self, slab: int, requests: list[Request], address: int) -> None:
        for offset, nbytes in requests:
            self._file.write_from(address + offset, slab * self.slab_bytes + offset, nbytes)
        self._count(written=sum(nbytes for _, nbytes in requests))

    def _keep(self, kept: list[Tail], address: int, tails: int) -> None:
        for place, start, stop in kept:
            ctypes.memmove(self._tail(tails, place, start), address + start, stop - start)

    def _tail(self, tails: int, place: int, start: int) -> int:
        """Where the byte ``start`` of a slab is among its tails."""
        return tails + place * self._block_bytes + start % self._block_bytes

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
