"""KV on disk: only whole blocks move, nobody's rows are lost, and no file outlives its process."""

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
from flexrun.offload.kv_file import KVFile, blocks_of_pass, cover
from flexrun.offload.kv_store import TokenSpace
from flexrun.offload.tiers import Buffer, MemoryTier

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)


def ranges(*rows: tuple[int, ...]) -> numpy.ndarray:
    return numpy.array(rows, dtype=numpy.int64).reshape(len(rows), -1 if rows else 2)


def touched(requests: list[list[tuple[int, int]]]) -> list[int]:
    """First bytes of the pages of all requests, in order."""
    return [page for part in requests for start, size in part for page in range(start, start + size, PAGE_BYTES)]


def read_pages(blocks) -> list[int]:
    return touched([requests for requests, _ in blocks.reads])


# Which blocks ----------------------------------------------------------------------------------------------


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


def test_neighbours_are_read_together_and_only_full_blocks_are_written():
    page, gap = PAGE_BYTES, kv_file.GAP_BYTES
    far = 10 * page + gap
    rows = [
        (0, 2 * page + 10, 2 * page + 20),  # fills no block
        (6 * page, 9 * page, 9 * page + 1),
        (far + page, far + 2 * page - 5, far + 4 * page + 1),
    ]
    blocks = blocks_of_pass(ranges(*rows), [2, 0, 1], page)
    assert read_pages(blocks) == list(range(0, 9 * page, page))
    assert touched(blocks.writes) == [far + page, far + 2 * page, far + 3 * page]
    assert [tail for _, tails in blocks.reads for tail in tails] == [(2, 2 * page, 2 * page + 10)]
    assert blocks.cached == [(1, far + page, far + 2 * page - 5)]
    assert blocks.kept == [
        (2, 2 * page, 2 * page + 20),
        (0, 9 * page, 9 * page + 1),
        (1, far + 4 * page, far + 4 * page + 1),
    ]


def test_a_block_of_two_sequences_is_the_second_ones():
    page = PAGE_BYTES
    rows = [(0, page + 50, page + 100), (page + 100, page + 100, 3 * page + 7)]
    blocks = blocks_of_pass(ranges(*rows), [0, 1], page)
    assert touched(blocks.writes) == [page, 2 * page], "the first one ends in a block that the second one fills"
    assert blocks.kept == [(0, page, page + 100), (1, 3 * page, 3 * page + 7)]
    rows = [(0, page + 100, page + 100), (page + 100, 3 * page + 7, 3 * page + 8)]
    again = blocks_of_pass(ranges(*rows), [0, 1], page)
    (requests, tails), *others = again.reads
    assert (read_pages(again), others) == ([0, page, 2 * page], [])
    assert requests == [(0, 3 * page)] and tails == [(0, page, page + 100)], "put in after the block is read"
    assert again.cached == [(1, 3 * page, 3 * page + 7)]


def test_large_ranges_are_read_in_requests_and_dealt_out_evenly():
    size = 9 * kv_file.REQUEST_BYTES + 16 * PAGE_BYTES
    blocks = blocks_of_pass(ranges((0, size, size + 1)), [0], 4 * PAGE_BYTES)
    requests = [request for part, _ in blocks.reads for request in part]
    assert max(nbytes for _, nbytes in requests) == kv_file.REQUEST_BYTES
    assert sum(nbytes for _, nbytes in requests) == size
    full = [(place * 9 * PAGE_BYTES, place * 9 * PAGE_BYTES + 5) for place in range(100)]
    many = blocks_of_pass(
        ranges(*((start, at, start + PAGE_BYTES) for start, at in full)), list(range(100)), PAGE_BYTES
    )
    assert 3 <= len(many.writes) <= kv_file.PARTS + 1
    assert len(touched(many.writes)) == 100
    assert max(map(len, many.writes)) <= 2 * min(map(len, many.writes)) + 12


# The file -------------------------------------------------------------------------------------------------

SLAB = 6 * PAGE_BYTES


@pytest.fixture
def open_file(tmp_path):
    """open_file(slabs=3, limit=None, **options) -> (KVFile in tmp_path, its tier); closed when the test ends."""
    opened = []

    def build(slabs: int = 3, limit: int | None = None, **options) -> tuple[KVFile, MemoryTier]:
        tier = MemoryTier(Tier.DISK, limit)
        opened.append(KVFile(tmp_path, SLAB - 100, slabs, PAGE_BYTES, tier, **options))
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
    fills, reads = (blocks_of_pass(ranges((0, cached, SLAB)), [0], PAGE_BYTES) for cached in (0, SLAB))
    for slab in (2, 0, 1):
        image.data.fill_(slab + 1)
        do(file.write_parts(slab, fills, image.data.data_ptr(), 0))
    for slab in range(3):
        do(file.read_parts(slab, reads, image.data.data_ptr(), 0))
        assert torch.all(image.data == slab + 1)
    assert file.read_bytes == file.written_bytes == 3 * SLAB
    file.close()
    file.close()
    assert tier.used_bytes == 0


@PROPERTY
@given(st.data())
def test_a_run_of_passes_loses_no_row(tmp_path_factory, data):
    """Sequences side by side in one slab, any of them in a pass, others in the room of those that ended: every pass
    finds all rows of its sequences."""
    row_bytes = data.draw(st.sampled_from([48, 512, 1000, 4096, 6000, 20000]))
    block_bytes = data.draw(st.sampled_from([PAGE_BYTES, 4 * PAGE_BYTES]))
    tokens = data.draw(st.integers(1, 60))
    file = KVFile(tmp_path_factory.getbasetemp(), tokens * row_bytes, 1, block_bytes, MemoryTier(Tier.DISK, None))
    image, kept = Buffer.outside_budget(file.slab_bytes), Buffer.outside_budget(6 * block_bytes)
    address, tails, space = image.data.data_ptr(), kept.data.data_ptr(), TokenSpace(tokens)
    running: dict[int, tuple[int, int, bytes]] = {}  # place among the tails -> first row, rows of room, what it has
    value = 0
    try:
        for _ in range(data.draw(st.integers(1, 8))):
            for place in [place for place in running if data.draw(st.integers(0, 5)) == 0]:
                start, room, _ = running.pop(place)
                space.release(start, room)
            for place in set(range(6)) - set(running):
                room = data.draw(st.integers(1, 20))
                if data.draw(st.booleans()) and (start := space.allocate(room)) is not None:
                    running[place] = (start, room, b"")
            grown = {}
            for place, (start, room, had) in running.items():
                length = len(had) // row_bytes
                if length < room and data.draw(st.booleans()):
                    grown[place] = (start, start + length, start + length + data.draw(st.integers(1, room - length)))
            if not grown:
                continue
            blocks = blocks_of_pass(ranges(*grown.values()) * row_bytes, list(grown), block_bytes)
            image.data.fill_(255)  # another slab's leavings
            parts = file.read_parts(0, blocks, address, tails)
            do(data.draw(st.permutations(parts)))
            found = image.data.numpy().tobytes()
            for place, (start, cached, stop) in grown.items():
                first, room, had = running[place]
                assert found[start * row_bytes : cached * row_bytes] == had
                value = value % 250 + 1
                new = bytes([value]) * ((stop - cached) * row_bytes)
                image.data[cached * row_bytes : stop * row_bytes] = value
                running[place] = (first, room, had + new)
            do(data.draw(st.permutations(file.write_parts(0, blocks, address, tails))))
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
        KVFile(tmp_path, SLAB, 1, PAGE_BYTES, tier)
    assert tier.used_bytes == 0


def test_a_limit_on_file_sizes_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(BudgetError, match=r"KV cache needs 6\.0 MiB .*File too large"):
            KVFile(tmp_path, SLAB, 256, PAGE_BYTES, MemoryTier(Tier.DISK, None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent: cannot keep KV cache there: No such file"):
        KVFile(tmp_path / "absent", SLAB, 1, PAGE_BYTES, MemoryTier(Tier.DISK, None))


def test_failing_and_short_requests_are_named(open_file, tmp_path, monkeypatch):
    file, _ = open_file()
    image = Buffer.outside_budget(SLAB)
    fills, reads = (blocks_of_pass(ranges((0, cached, SLAB)), [0], PAGE_BYTES) for cached in (0, SLAB))

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    for name, parts, blocks in (("preadv", file.read_parts, reads), ("pwritev", file.write_parts, fills)):
        for stand_in, told in ((fail, "failed: Input/output error"), (lambda *_: 0, "short ")):
            with monkeypatch.context() as patch:
                patch.setattr(disk_io.os, name, stand_in)
                with pytest.raises(ExecutionError, match=rf"KV cache in {tmp_path}: .*{told}"):
                    do(parts(1, blocks, image.data.data_ptr(), 0))
    assert file.read_bytes == file.written_bytes == 0


KILLED = """
import sys, time
from flexrun.core import Tier
from flexrun.offload.kv_file import KVFile
from flexrun.offload.tiers import MemoryTier
file = KVFile(sys.argv[1], 64 << 20, 4, 4096, MemoryTier(Tier.DISK, None))
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
