"""KV on disk: only the pages that a pass needs move, nobody's rows are lost, and no file outlives its process."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun import disk_io
from flexrun.core import PAGE_BYTES, Tier
from flexrun.errors import BudgetError, ConfigError, ExecutionError
from flexrun.offload import kv_file
from flexrun.offload.kv_file import KVFile, cover, pages_of
from flexrun.offload.tiers import Buffer, MemoryTier

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)


def ranges(*pairs: tuple[int, int]) -> numpy.ndarray:
    return numpy.array(pairs, dtype=numpy.int64).reshape(-1, 2)


def touched(requests: list[list[tuple[int, int]]]) -> list[int]:
    """First bytes of the pages of all requests, in order."""
    return [page for part in requests for start, size in part for page in range(start, start + size, PAGE_BYTES)]


# Which pages ----------------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=12), st.integers(1, 9), st.integers(0, 20))
def test_a_cover_is_the_units_touched_and_small_gaps_between_them(starts, unit, gap):
    covered = cover(ranges(*((start, start + size) for start, size in starts)), unit, gap)
    inside = {place for start, size in starts for place in range(start, start + size)}
    units = {place // unit * unit + rest for place in inside for rest in range(unit)}
    found = {place for start, stop in covered.tolist() for place in range(start, stop)}
    assert units <= found
    for place in found - units:  # in a gap: between two touched places that lie no further apart than is allowed
        low = max(other for other in units if other < place)
        high = min(other for other in units if other > place)
        assert high - low - 1 <= gap
    edges = covered.ravel().tolist()
    assert edges == sorted(edges)
    assert all(later - earlier > gap for earlier, later in zip(covered[:-1, 1].tolist(), covered[1:, 0].tolist()))


def test_neighbours_are_read_together_and_only_pages_of_new_rows_are_written():
    page, gap = PAGE_BYTES, kv_file.GAP_BYTES
    far = 10 * page + gap
    cached = ranges((0, 2 * page + 10), (6 * page, 9 * page), (far + page, far + 2 * page))
    new = ranges((2 * page + 10, 2 * page + 20), (9 * page, 9 * page + 1), (far + 2 * page - 1, far + 2 * page + 1))
    pages = pages_of(cached, new, ranges())
    assert touched(pages.reads) == [*range(0, 9 * page, page), far + page]
    assert touched(pages.writes) == [2 * page, 9 * page, far + page, far + 2 * page]
    assert pages.patches == []


def test_large_ranges_are_read_in_blocks_and_dealt_out_evenly():
    size = 9 * kv_file.REQUEST_BYTES + PAGE_BYTES
    pages = pages_of(ranges((0, size)), ranges((size, size + 1)), ranges())
    requests = [request for part in pages.reads for request in part]
    assert max(nbytes for _, nbytes in requests) == kv_file.REQUEST_BYTES
    assert sum(nbytes for _, nbytes in requests) == size
    many = pages_of(
        ranges(), ranges(*((place * 9 * PAGE_BYTES, place * 9 * PAGE_BYTES + 5) for place in range(100))), ranges()
    )
    assert 3 <= len(many.writes) <= kv_file.PARTS + 1
    assert len(touched(many.writes)) == 100
    assert max(map(len, many.writes)) <= 2 * min(map(len, many.writes)) + 12


def test_pages_shared_with_absent_sequences_are_patched():
    page = PAGE_BYTES
    new = ranges((page + 100, 4 * page + 50), (4 * page + 3000, 4 * page + 4000))
    absent = ranges((0, page + 100), (4 * page + 50, 4 * page + 3000), (6 * page, 7 * page))
    pages = pages_of(ranges(), new, absent)
    assert touched(pages.writes) == [2 * page, 3 * page]
    assert pages.patches == [
        (page, [(page + 100, 2 * page)]),
        (4 * page, [(4 * page, 4 * page + 50), (4 * page + 3000, 4 * page + 4000)]),
    ]


# The file -------------------------------------------------------------------------------------------------

SLAB = 6 * PAGE_BYTES


@pytest.fixture
def open_file(tmp_path):
    """open_file(slabs=3, limit=None, **options) -> (KVFile in tmp_path, its tier); closed when the test ends."""
    opened = []

    def build(slabs: int = 3, limit: int | None = None, **options) -> tuple[KVFile, MemoryTier]:
        tier = MemoryTier(Tier.DISK, limit)
        opened.append(KVFile(tmp_path, SLAB - 100, slabs, tier, **options))
        return opened[-1], tier

    yield build
    for file in opened:
        file.close()


def do(parts) -> None:
    for part in parts:
        part()


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_read_back_slab_by_slab(open_file, tmp_path, direct):
    file, tier = open_file(direct=direct)
    assert (file.slab_bytes, file.nbytes, tier.used_by_kind) == (SLAB, 3 * SLAB, {"kv": 3 * SLAB})
    assert direct or not file.direct
    assert list(tmp_path.iterdir()) == []
    image = Buffer.outside_budget(SLAB)
    everything = ranges((0, SLAB))
    pages = pages_of(everything, everything, ranges())
    for slab in (2, 0, 1):
        image.data.fill_(slab + 1)
        do(file.write_parts(slab, pages, image.data.data_ptr()))
    for slab in range(3):
        do(file.read_parts(slab, pages, image.data.data_ptr()))
        assert torch.all(image.data == slab + 1)
    assert file.read_bytes == file.written_bytes == 3 * SLAB
    file.close()
    file.close()
    assert tier.used_bytes == 0


@PROPERTY
@given(st.data())
def test_a_run_of_passes_loses_no_row(tmp_path_factory, data):
    """Sequences side by side in one slab, any of them in a pass: afterwards every row is there."""
    row_bytes = data.draw(st.sampled_from([48, 512, 1000, 4096, 6000]))
    rooms = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    starts = [sum(rooms[:place]) for place in range(len(rooms))]
    file = KVFile(tmp_path_factory.getbasetemp(), sum(rooms) * row_bytes, 1, MemoryTier(Tier.DISK, None))
    expected, lengths, value = bytearray(file.slab_bytes), [0] * len(rooms), 0
    image = Buffer.outside_budget(file.slab_bytes)
    try:
        for _ in range(data.draw(st.integers(1, 5))):
            grown = {
                place: data.draw(st.integers(1, rooms[place] - lengths[place]))
                for place in range(len(rooms))
                if lengths[place] < rooms[place] and data.draw(st.booleans())
            }
            if not grown:
                continue
            cached = ranges(*((starts[place], starts[place] + lengths[place]) for place in grown))
            new = ranges(*((start, start + count) for (_, start), count in zip(cached.tolist(), grown.values())))
            absent = ranges(
                *((starts[place], starts[place] + rooms[place]) for place in set(range(len(rooms))) - set(grown))
            )
            pages = pages_of(cached * row_bytes, new * row_bytes, absent * row_bytes)
            image.data.fill_(255)  # another slab's leavings
            do(file.read_parts(0, pages, image.data.data_ptr()))
            found = image.data.numpy().tobytes()
            for start, stop in (cached * row_bytes).tolist():
                assert found[start:stop] == expected[start:stop]
            for start, stop in (new * row_bytes).tolist():
                value = value % 250 + 1
                expected[start:stop] = bytes([value]) * (stop - start)
                image.data[start:stop] = value
            do(file.write_parts(0, pages, image.data.data_ptr()))
            for place, count in grown.items():
                lengths[place] += count
        whole = pages_of(ranges((0, file.slab_bytes)), ranges(), ranges())
        do(file.read_parts(0, whole, image.data.data_ptr()))
        found = image.data.numpy().tobytes()
        for start, length in zip(starts, lengths):
            assert (
                found[start * row_bytes : (start + length) * row_bytes]
                == expected[start * row_bytes : (start + length) * row_bytes]
            )
    finally:
        file.close()


# What can go wrong ----------------------------------------------------------------------------------------


def test_a_budget_too_small_is_named_and_nothing_is_taken(open_file):
    with pytest.raises(BudgetError, match="disk tier: kv needs"):
        open_file(limit=SLAB)


def test_a_full_disk_is_named_before_anything_runs(open_file, tmp_path, monkeypatch):
    with pytest.raises(BudgetError) as error:
        open_file(slabs=1 << 40)
    assert f"in {tmp_path}" in error.value.message
    assert "free" in error.value.message and "TiB" in error.value.message
    assert "--disk-dir" in error.value.hint
    tier = MemoryTier(Tier.DISK, None)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk_io.os, "posix_fallocate", refuse)  # others took what was free a moment ago
    with pytest.raises(BudgetError, match="No space left on device"):
        KVFile(tmp_path, SLAB, 1, tier)
    assert tier.used_bytes == 0


def test_a_limit_on_file_sizes_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(BudgetError, match=r"KV cache needs 6\.0 MiB .*File too large"):
            KVFile(tmp_path, SLAB, 256, MemoryTier(Tier.DISK, None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent: cannot keep KV cache there: No such file"):
        KVFile(tmp_path / "absent", SLAB, 1, MemoryTier(Tier.DISK, None))


def test_failing_and_short_requests_are_named(open_file, tmp_path, monkeypatch):
    file, _ = open_file()
    image, everything = Buffer.outside_budget(SLAB), ranges((0, SLAB))
    pages = pages_of(everything, everything, ranges())

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    for name, parts in (("preadv", file.read_parts), ("pwritev", file.write_parts)):
        for stand_in, told in ((fail, "failed: Input/output error"), (lambda *_: 0, "short ")):
            with monkeypatch.context() as patch:
                patch.setattr(disk_io.os, name, stand_in)
                with pytest.raises(ExecutionError, match=rf"KV cache in {tmp_path}: .*{told}"):
                    do(parts(1, pages, image.data.data_ptr()))
    assert file.read_bytes == file.written_bytes == 0


KILLED = """
import sys, time
from flexrun.core import Tier
from flexrun.offload.kv_file import KVFile
from flexrun.offload.tiers import MemoryTier
file = KVFile(sys.argv[1], 64 << 20, 4, MemoryTier(Tier.DISK, None))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_process_leaves_neither_a_file_nor_its_space(tmp_path):
    def free_bytes() -> int:
        told = os.statvfs(tmp_path)
        return told.f_bfree * told.f_frsize

    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().strip() == "ready"
        assert list(tmp_path.iterdir()) == []
        held = free_bytes()
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 10
    while free_bytes() - held < 200 << 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert free_bytes() - held > 200 << 20, "the 256 MiB are free again"
