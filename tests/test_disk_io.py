"""Direct reads bring what is in the file, past the page cache, and name the file when they cannot."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from flexrun import disk_io
from flexrun.core import PAGE_BYTES
from flexrun.disk_io import DirectFile, RowFile, blocks_of
from flexrun.errors import ExecutionError
from flexrun.offload.tiers import Buffer

PAGES = 9


@pytest.fixture
def content(tmp_path):
    """(path, its bytes): a file of whole pages."""
    data = torch.randint(0, 256, (PAGES * PAGE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "layer.bin"
    path.write_bytes(data.numpy().tobytes())
    return path, data


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("offset", "nbytes"), [(0, PAGES * PAGE_BYTES), (PAGE_BYTES, 3 * PAGE_BYTES), (8192, 100)])
def test_reads_equal_the_file(content, direct, offset, nbytes):
    path, data = content
    target = Buffer.outside_budget(nbytes)
    file = DirectFile(path, direct=direct)
    for block in blocks_of(file, offset, nbytes, target.data):
        block.read()
    assert torch.equal(target.data[:nbytes], data[offset : offset + nbytes])
    file.close()
    file.close()


def test_direct_is_in_force_where_the_file_system_allows_it(content):
    path, _ = content
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system refuses O_DIRECT")
    assert DirectFile(path).direct
    assert not DirectFile(path, direct=False).direct


def test_large_reads_are_split_into_blocks(content, monkeypatch):
    path, data = content
    monkeypatch.setattr(disk_io, "BLOCK_BYTES", 2 * PAGE_BYTES)
    target = Buffer.outside_budget(5 * PAGE_BYTES)
    blocks = blocks_of(DirectFile(path), PAGE_BYTES, 4 * PAGE_BYTES + 1, target.data)
    assert [block.nbytes for block in blocks] == [2 * PAGE_BYTES, 2 * PAGE_BYTES, PAGE_BYTES]
    for block in reversed(blocks):
        block.read()
    assert torch.equal(target.data, data[PAGE_BYTES : 6 * PAGE_BYTES])


def test_a_target_that_cannot_take_a_direct_read_is_refused(content):
    file, target = DirectFile(content[0]), Buffer.outside_budget(2 * PAGE_BYTES).data
    with pytest.raises(ExecutionError, match="not page-aligned"):
        blocks_of(file, 0, 10, target[16:])
    with pytest.raises(ExecutionError, match="too small"):
        blocks_of(file, 0, 2 * PAGE_BYTES + 1, target)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("left", [0, 2 * PAGE_BYTES, 2 * PAGE_BYTES + 700])
def test_a_file_that_ends_early_is_named(content, direct, left):
    path, _ = content
    file, target = DirectFile(path, direct=direct), Buffer.outside_budget(4 * PAGE_BYTES)
    os.truncate(path, left)
    (block,) = blocks_of(file, 0, 4 * PAGE_BYTES, target.data)
    with pytest.raises(ExecutionError, match=rf"layer\.bin: short read, {left} of 16384 bytes at offset 0"):
        block.read()


def test_a_failing_disk_is_named(content, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    target = Buffer.outside_budget(PAGE_BYTES)
    (block,) = blocks_of(DirectFile(content[0]), 0, 10, target.data)
    monkeypatch.setattr(disk_io.os, "preadv", fail)
    with pytest.raises(ExecutionError, match=r"layer\.bin: read of 4096 bytes at 0 failed: Input/output error"):
        block.read()


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ExecutionError, match=r"cannot open .*nothing\.bin"):
        DirectFile(tmp_path / "nothing.bin")


def test_a_file_system_without_direct_reads_is_read_through_the_cache(content, monkeypatch):
    real = os.open

    def refusing(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(disk_io.os, "open", refusing)
    file, target = DirectFile(content[0]), Buffer.outside_budget(PAGE_BYTES)
    assert not file.direct
    for block in blocks_of(file, PAGE_BYTES, PAGE_BYTES, target.data):
        block.read()
    assert torch.equal(target.data, content[1][PAGE_BYTES : 2 * PAGE_BYTES])


def test_threads_that_lose_direct_reads_midway_all_go_on(content, monkeypatch):
    """A file system may accept the open and refuse the read: every thread falls back, none loses its descriptor."""
    path, data = content
    file = DirectFile(path)
    file.direct = True  # as if the open had been accepted
    first, real, together = file._descriptor, os.preadv, threading.Barrier(4)

    def refusing(descriptor, *rest):
        if descriptor == first:
            together.wait(10)  # all four are inside a direct read when the first of them falls back
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, *rest)

    monkeypatch.setattr(disk_io.os, "preadv", refusing)
    targets = [Buffer.outside_budget(PAGE_BYTES) for _ in range(4)]
    errors = []

    def read(number: int) -> None:
        try:
            for block in blocks_of(file, number * PAGE_BYTES, PAGE_BYTES, targets[number].data):
                block.read()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []
    assert not file.direct
    for number, target in enumerate(targets):
        assert torch.equal(target.data, data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])
    file.close()


def test_rows_are_gathered(content):
    path, data = content
    rows = RowFile(path, PAGE_BYTES, 24)
    target = torch.zeros(4, 24, dtype=torch.uint8)
    rows.read_rows([5, 0, 90], target)
    for place, row in enumerate((5, 0, 90)):
        assert torch.equal(target[place], data[PAGE_BYTES + row * 24 : PAGE_BYTES + (row + 1) * 24])
    assert not target[3].any()
    with pytest.raises(ExecutionError, match=r"layer\.bin: short read of row 99999"):
        rows.read_rows([99999], target)
    rows.close()
    rows.close()
