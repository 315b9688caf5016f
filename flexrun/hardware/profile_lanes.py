"""Times the lanes that move bytes in RAM and on disk, with as many threads and as large requests as the engine uses."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from flexrun.core import PAGE_BYTES, align_up, format_bytes
from flexrun.disk_io import BLOCK_BYTES, DirectFile, blocks_of
from flexrun.errors import ConfigError, ExecutionError
from flexrun.hardware.curves import fit_transfer
from flexrun.hardware.effort import MIB, Bench
from flexrun.hardware.rates import Transfer
from flexrun.hardware.timing import Reading

DISK_THREADS = 8  # requests in flight, as in offload.executor
SPARE_BYTES = 256 * MIB  # left free on the disk
LEAST_FILE_BYTES = 16 * MIB
WEIGHTS_BYTES = (256 * MIB, 8192 * MIB)  # of files that lie there already: fewer are not read from, more not needed


def fit_readings(sizes: Sequence[int], readings: Sequence[Reading]) -> tuple[Transfer, float, float]:
    """(transfer, misfit, spread) from a reading of each size in bytes."""
    transfer, misfit = fit_transfer([(nbytes, reading.seconds) for nbytes, reading in zip(sizes, readings)])
    return transfer, misfit, median(reading.spread for reading in readings)


def arena(nbytes: int) -> Tensor:
    """Page-aligned memory as the tiers have it, every page touched: uint8 [nbytes]."""
    memory = mmap.mmap(-1, align_up(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    tile = torch.randint(0, 256, (min(MIB, len(data)),), dtype=torch.uint8)  # nothing a disk could compress
    for start in range(0, len(data), len(tile)):
        part = data[start : start + len(tile)]
        part.copy_(tile[: len(part)])
    return data


# Copies ---------------------------------------------------------------------------------------------------


def copy_call(source: Tensor, target: Tensor, nbytes: int) -> Callable[[], object]:
    """Copies ``nbytes`` from one arena to the other, each time from and to other places."""
    starts = _starts(len(source), nbytes)

    @torch.inference_mode()
    def copy() -> None:
        start = next(starts)
        target[start : start + nbytes].copy_(source[start : start + nbytes])

    return copy


def host_copy(bench: Bench) -> tuple[Transfer, float, float]:
    """(transfer, misfit, spread) of memcpy on a thread of its own, as a copy lane has."""
    bench.advance("host copy")
    effort = bench.effort
    nbytes = max(max(effort.copy_sizes), bench.pool_bytes // 2)
    source, target = arena(nbytes), arena(nbytes)
    calls = [copy_call(source, target, size) for size in effort.copy_sizes]
    with ThreadPoolExecutor(1) as thread:
        return fit_readings(effort.copy_sizes, thread.submit(bench.read_all, calls).result())


def _starts(total_bytes: int, nbytes: int) -> Iterator[int]:
    """Page-aligned places for ``nbytes``, one behind the other, over and over."""
    step = align_up(nbytes)
    if nbytes > total_bytes:
        raise ValueError(f"{nbytes} bytes do not fit in {total_bytes}")
    while True:
        yield from range(0, total_bytes - nbytes + 1, step)


# Disk -----------------------------------------------------------------------------------------------------


def weights_in(folder: Path) -> list[tuple[DirectFile, int]]:
    """The largest files of packed weights in the folder or two below it, open, with their bytes; none where they are
    small."""
    sizes = []
    for pattern in ("*.bin", "*/*.bin", "*/*/*.bin"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # gone meanwhile
                sizes.append((path.stat().st_size // PAGE_BYTES * PAGE_BYTES, path))
    least, most = WEIGHTS_BYTES
    found, total = [], 0
    for nbytes, path in sorted(sizes, reverse=True):
        if nbytes >= LEAST_FILE_BYTES and total < most:
            with contextlib.suppress(ExecutionError):
                found.append((DirectFile(path), nbytes))
                total += nbytes
    if total >= least:
        return found
    for file, _ in found:
        file.close()
    return []


class ScratchFile:
    """A file of random bytes in ``folder`` for the time of a measurement; it is removed whatever happens.

    Reads are timed on weights that lie in the folder, if there are enough: what has just been written, a virtual disk
    reads faster (here 3.7 GB/s) than what has lain there for hours (3.0).
    ``nbytes`` is what was written within ``effort.disk_seconds``. Raises ConfigError where the folder cannot take it.
    """

    def __init__(self, folder: str | Path, bench: Bench):
        self.folder, self.bench = Path(folder), bench
        self.path = self.folder / f".flexrun-profile-{os.getpid()}"
        self.nbytes = 0
        self.write_seconds = 0.0
        self._descriptor = -1
        self._readable: list[tuple[DirectFile, int]] = []  # with the bytes of each
        self._pool = ThreadPoolExecutor(DISK_THREADS)

    def __enter__(self) -> ScratchFile:
        try:
            self._open()
            self._fill()
        except OSError as error:
            self.__exit__()
            raise ConfigError(
                f"cannot write a scratch file in {self.folder}: {error.strerror}", "name a folder with --disk-dir"
            ) from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        needed = self.bench.effort.file_bytes + SPARE_BYTES
        if free < needed:
            raise ConfigError(
                f"{self.folder} has {format_bytes(free)} free; measuring the disk takes {format_bytes(needed)}",
                "free some space, or name another folder with --disk-dir",
            )
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(self.path, flags | getattr(os, "O_DIRECT", 0), 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(self.path, flags, 0o600)  # a file system without direct access
        self._memory = arena(4 * BLOCK_BYTES)

    def _fill(self) -> None:
        effort = self.bench.effort
        start_seconds = time.perf_counter()
        while self.nbytes < effort.file_bytes:
            size = min(4 * BLOCK_BYTES, effort.file_bytes - self.nbytes)
            self._write(self.nbytes, size)
            self.nbytes += size
            late = time.perf_counter() - start_seconds > effort.disk_seconds
            if late and self.nbytes >= LEAST_FILE_BYTES:
                break
        self.write_seconds = time.perf_counter() - start_seconds
        self._readable = weights_in(self.folder) or [(DirectFile(self.path), self.nbytes)]

    def _write(self, start: int, nbytes: int) -> None:
        """Write and wait until the disk has it."""
        address, length = self._memory.data_ptr(), len(self._memory)
        parts = [(offset, min(BLOCK_BYTES, nbytes - offset)) for offset in range(0, nbytes, BLOCK_BYTES)]
        self._all(lambda offset, count: self._write_block(address + offset % length, start + offset, count), parts)
        os.fdatasync(self._descriptor)

    def _write_block(self, address: int, offset: int, nbytes: int) -> None:
        done, retried = 0, False
        while done < nbytes:
            window = (ctypes.c_char * (nbytes - done)).from_address(address + done)
            try:
                done += os.pwritev(self._descriptor, [window], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or retried:
                    raise
                retried = True  # a file system that finds out at the first write that it has no direct access
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))

    def _all(self, call: Callable[..., object], arguments: Sequence[tuple]) -> None:
        """Every call on the pool's threads, several in flight; the first error is raised when all have ended."""
        futures = [self._pool.submit(call, *each) for each in arguments]
        wait(futures)
        for future in futures:
            future.result()

    def write_call(self, nbytes: int) -> Callable[[], object]:
        starts = _starts(self.nbytes, nbytes)
        return lambda: self._write(next(starts), nbytes)

    def read_call(self, nbytes: int, target: Tensor) -> Callable[[], object]:
        """Reads ``nbytes`` into ``target``, in blocks, as a lane reads a unit of weights: each time from another place,
        all over the files, as some places are faster than others."""
        places = [
            (file, start)
            for file, file_bytes in self._readable
            for start in range(0, file_bytes - nbytes + 1, align_up(nbytes))
        ]
        random.Random(0).shuffle(places)
        following = itertools.cycle(places)
        return lambda: self._all(
            lambda block: block.read(), [(block,) for block in blocks_of(*next(following), nbytes, target)]
        )

    def sizes(self) -> list[int]:
        """Request sizes that fit the file and, by how long writing took, the time there is."""
        speed = self.nbytes / self.write_seconds
        most = min(self.nbytes // 2, int(speed * self.bench.effort.disk_seconds / 4))
        sizes = self.bench.effort.disk_sizes
        return [size for size in sizes if size <= most] or list(sizes[:2])

    def read_transfer(self) -> tuple[Transfer, float, float]:
        """(transfer, misfit, spread) of reading."""
        self.bench.advance("disk read")
        longest = max(file_bytes for _, file_bytes in self._readable)
        sizes = [size for size in self.sizes() if size <= longest]
        target = arena(max(sizes))
        return self._transfer(sizes, lambda size: self.read_call(size, target), typical=True)

    def write_transfer(self) -> tuple[Transfer, float, float]:
        """(transfer, misfit, spread) of writing."""
        self.bench.advance("disk write")
        return self._transfer(self.sizes(), self.write_call)

    def _transfer(
        self, sizes: Sequence[int], call_of: Callable[[int], Callable[[], object]], *, typical: bool = False
    ) -> tuple[Transfer, float, float]:
        return fit_readings(sizes, self.bench.read_all([call_of(size) for size in sizes], most=32, typical=typical))

    def __exit__(self, *_) -> None:
        self._pool.shutdown()
        for file, _ in self._readable:
            file.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
