"""Direct reads bring what is in the file, past the page cache, and name the file when they cannot."""

from __future__ import annotations

import errno
import fcntl
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
    monkeypatch.setattr(disk_io, "BLOCK_BYTES", 4 * PAGE_BYTES)  # in equal ones, not 4 pages and 1
    assert [block.nbytes for block in blocks_of(blocks[0].file, 0, 5 * PAGE_BYTES, target.data)] == [
        3 * PAGE_BYTES,
        2 * PAGE_BYTES,
    ]
    assert not blocks_of(blocks[0].file, 0, 0, target.data)
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


@pytest.fixture
def refuse_direct(monkeypatch):
    """The file system at hand has no direct access, and says so when it is asked."""
    real = disk_io.fcntl.fcntl

    def refusing(descriptor, command, *flags):
        if command == disk_io.fcntl.F_SETFL and flags[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, command, *flags)

    monkeypatch.setattr(disk_io.fcntl, "fcntl", refusing)


def test_a_file_system_without_direct_reads_is_read_through_the_cache(content, refuse_direct):
    file, target = DirectFile(content[0]), Buffer.outside_budget(PAGE_BYTES)
    assert not file.direct
    for block in blocks_of(file, PAGE_BYTES, PAGE_BYTES, target.data):
        block.read()
    assert torch.equal(target.data, content[1][PAGE_BYTES : 2 * PAGE_BYTES])


def test_threads_that_lose_direct_reads_midway_all_go_on(content, monkeypatch):
    """A file system may accept O_DIRECT and refuse the read: every thread falls back, none fails."""
    path, data = content
    file = DirectFile(path)
    assert file.direct
    real, together = os.preadv, threading.Barrier(4)

    def refusing(descriptor, *rest):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
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


# A file without a name ------------------------------------------------------------------------------------


def random_pages(pages: int) -> Buffer:
    buffer = Buffer.outside_budget(pages * PAGE_BYTES)
    buffer.data.random_(0, 256, generator=torch.Generator().manual_seed(1))
    return buffer


@pytest.mark.parametrize("direct", [True, False])
def test_a_nameless_file_gives_back_what_was_written(tmp_path, direct):
    file, source, target = (
        DirectFile.nameless(tmp_path, 6 * PAGE_BYTES, direct=direct),
        random_pages(4),
        random_pages(6),
    )
    assert direct or not file.direct
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(file._descriptor).st_blocks * 512 >= 6 * PAGE_BYTES, "its space is taken at once"
    for block in blocks_of(file, PAGE_BYTES, 4 * PAGE_BYTES, source.data):
        block.write()
    for block in blocks_of(file, 0, 6 * PAGE_BYTES, target.data):
        block.read()
    assert torch.equal(target.data[PAGE_BYTES : 5 * PAGE_BYTES], source.data)
    assert not target.data[:PAGE_BYTES].any() and not target.data[5 * PAGE_BYTES :].any()
    file.close()
    file.close()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EISDIR])
def test_a_file_system_without_nameless_files_gets_one_whose_name_is_gone(tmp_path, monkeypatch, code):
    real = os.open

    def refusing(path, flags, *rest, **more):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest, **more)

    (tmp_path / f"{disk_io._NAMELESS}stale").touch()
    monkeypatch.setattr(disk_io.os, "open", refusing)
    file, source, target = DirectFile.nameless(tmp_path, PAGE_BYTES), random_pages(1), Buffer.outside_budget(PAGE_BYTES)
    assert list(tmp_path.iterdir()) == []
    file.write_from(source.data.data_ptr(), 0, PAGE_BYTES)
    file.read_into(target.data.data_ptr(), 0, PAGE_BYTES)
    assert torch.equal(target.data, source.data)
    file.close()


def test_a_nameless_file_without_direct_access_is_used_through_the_cache(tmp_path, refuse_direct):
    file, source, target = DirectFile.nameless(tmp_path, PAGE_BYTES), random_pages(1), Buffer.outside_budget(PAGE_BYTES)
    assert not file.direct
    file.write_from(source.data.data_ptr(), 0, PAGE_BYTES)
    file.read_into(target.data.data_ptr(), 0, PAGE_BYTES)
    assert torch.equal(target.data, source.data)
    file.close()


def test_writes_that_come_in_pieces_are_completed(tmp_path, monkeypatch):
    file, source, target = DirectFile.nameless(tmp_path, 3 * PAGE_BYTES), random_pages(3), random_pages(3)
    real = os.pwritev
    monkeypatch.setattr(
        disk_io.os, "pwritev", lambda fd, windows, at: real(fd, [memoryview(windows[0])[:PAGE_BYTES]], at)
    )
    file.write_from(source.data.data_ptr(), 0, 3 * PAGE_BYTES)
    file.read_into(target.data.data_ptr(), 0, 3 * PAGE_BYTES)
    assert torch.equal(target.data, source.data)
    file.close()


def test_a_write_that_fails_or_stops_is_named(tmp_path, monkeypatch):
    file, source = DirectFile.nameless(tmp_path, PAGE_BYTES), random_pages(1)
    arguments = (source.data.data_ptr(), 0, PAGE_BYTES)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk_io.os, "pwritev", fail)
    told = rf"scratch file in {tmp_path}: write of 4096 bytes at 0 failed: Input/output error"
    with pytest.raises(ExecutionError, match=told):
        file.write_from(*arguments)
    monkeypatch.setattr(disk_io.os, "pwritev", lambda *_: 0)
    with pytest.raises(ExecutionError, match="short write, 0 of 4096 bytes at offset 0"):
        file.write_from(*arguments)
    file.close()


def test_space_that_is_not_there_leaves_nothing_open(tmp_path, monkeypatch):
    before = os.listdir("/proc/self/fd")

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk_io.os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"):
        DirectFile.nameless(tmp_path, PAGE_BYTES)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert list(tmp_path.iterdir()) == []


# Rows -----------------------------------------------------------------------------------------------------


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


def test_all_rows_are_on_their_way_before_the_first_is_waited_for(content, monkeypatch):
    path, data = content
    rows, calls = RowFile(path, 0, 24), []
    fadvise, preadv = os.posix_fadvise, os.preadv
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: (calls.append(given[1:]), fadvise(*given)))
    monkeypatch.setattr(os, "preadv", lambda *given: (calls.append("read"), preadv(*given))[1])
    target = torch.zeros(2, 24, dtype=torch.uint8)
    rows.read_rows([7, 90], target)
    rows.close()
    assert calls == [*((row * 24, 24, os.POSIX_FADV_WILLNEED) for row in (7, 90)), "read", "read"]
    assert torch.equal(target[1], data[90 * 24 : 91 * 24])


def test_a_failing_row_read_names_file_and_row(tmp_path, monkeypatch):
    path = tmp_path / "rows.bin"
    path.write_bytes(bytes(64))
    rows = RowFile(path, 0, 16)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ExecutionError, match=r"rows.bin: read of row 3 failed: Input/output error"):
        rows.read_rows([3], torch.empty(1, 16, dtype=torch.uint8))
    rows.close()
    with pytest.raises(ExecutionError, match="cannot open"):
        RowFile(tmp_path / "absent.bin", 0, 16)
