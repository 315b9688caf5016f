"""The scratch file is filled, read, and gone afterwards whatever happens; folders that cannot take it are refused."""

import errno
import fcntl
import os
from dataclasses import replace

import pytest

from flexrun.errors import ConfigError
from flexrun.hardware import profile_lanes
from flexrun.hardware.effort import MIB, Bench
from flexrun.hardware.profile_lanes import ScratchFile, arena, copy_call


@pytest.fixture
def bench(tiny_effort):
    return Bench(tiny_effort)


def test_the_file_holds_what_is_read_and_is_removed(bench, tmp_path):
    with ScratchFile(tmp_path / "sub", bench) as scratch:
        assert scratch.path.stat().st_size == scratch.nbytes == 16 * MIB
        target = arena(8 * MIB)
        target.zero_()
        call = scratch.read_call(8 * MIB, target)
        call()
        first = target.clone()
        content = scratch.path.read_bytes()
        assert first.numpy().tobytes() in (content[: 8 * MIB], content[8 * MIB :])
        assert first.unique().numel() == 256  # nothing that a disk could compress
        for transfer, misfit, spread in (scratch.read_transfer(), scratch.write_transfer()):
            assert transfer.bytes_per_second > 1e6 and misfit >= 0 and spread >= 0
        assert scratch.path.stat().st_size == 16 * MIB
    assert list((tmp_path / "sub").iterdir()) == []


def test_reads_are_timed_on_weights_that_lie_there(bench, tmp_path, monkeypatch):
    folder, (first, second) = tmp_path / "packed" / "model", (os.urandom(24 * MIB + 5), os.urandom(17 * MIB))
    folder.mkdir(parents=True)
    (folder / "layer-0001.bin").write_bytes(second)
    (folder / "layer-0000.bin").write_bytes(first)
    (folder / "norm.bin").write_bytes(bytes(MIB))
    target = arena(8 * MIB)
    with ScratchFile(tmp_path, bench) as scratch:  # too little to tell the disk's speed by
        scratch.read_call(8 * MIB, target)()
        assert target.numpy().tobytes() in scratch.path.read_bytes()
    monkeypatch.setattr(profile_lanes, "WEIGHTS_BYTES", (32 * MIB, 64 * MIB))
    with ScratchFile(tmp_path, bench) as scratch:
        call, read = scratch.read_call(8 * MIB, target), []
        for _ in range(6):
            call()
            read.append(target.numpy().tobytes())
        expected = [first[start * MIB : (start + 8) * MIB] for start in (0, 8, 16)]
        expected += [second[start * MIB : (start + 8) * MIB] for start in (0, 8)]
        assert sorted(read[:5]) == sorted(expected) and read[5] == read[0]  # every place in turn
        assert scratch.read_transfer()[0].bytes_per_second > 1e6
    assert len(list(tmp_path.rglob("*.bin"))) == 3


def test_it_is_removed_after_an_interrupt(bench, tmp_path):
    with pytest.raises(KeyboardInterrupt), ScratchFile(tmp_path, bench):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_it_is_removed_when_the_disk_fails_while_it_is_written(bench, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(ConfigError, match="No space left") as caught, ScratchFile(tmp_path, bench):
        pass
    assert "--disk-dir" in caught.value.hint and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_anything_is_written(bench, tmp_path, monkeypatch):
    usage = profile_lanes.shutil.disk_usage(tmp_path)._replace(free=100 * MIB)
    monkeypatch.setattr(profile_lanes.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConfigError, match="has 100") as caught, ScratchFile(tmp_path, bench):
        pass
    assert "--disk-dir" in caught.value.hint and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(bench, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write a scratch file"), ScratchFile(tmp_path / "file", bench):
        pass


def test_a_file_system_without_direct_access_is_measured_all_the_same(bench, tmp_path, monkeypatch):
    def no_direct(path, flags, *mode, original=os.open):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return original(path, flags, *mode)

    monkeypatch.setattr(os, "open", no_direct)
    with ScratchFile(tmp_path, bench) as scratch:
        scratch.read_call(MIB, arena(MIB))()
        scratch.write_call(MIB)()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_refuses_direct_writes_late_is_measured_too(bench, tmp_path, monkeypatch):
    def refuse(descriptor, windows, offset, original=os.pwritev):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct write")
        return original(descriptor, windows, offset)

    monkeypatch.setattr(os, "pwritev", refuse)
    with ScratchFile(tmp_path, bench) as scratch:
        assert scratch.path.stat().st_size == 16 * MIB


def test_a_slow_disk_ends_the_writing_early(tiny_effort, tmp_path):
    bench = Bench(replace(tiny_effort, file_bytes=64 * MIB, disk_seconds=0.0))
    with ScratchFile(tmp_path, bench) as scratch:
        assert scratch.nbytes == 16 * MIB and scratch.sizes() == list(tiny_effort.disk_sizes[:2])


def test_copies_go_through_the_whole_arena():
    source, target = arena(3 * MIB), arena(3 * MIB)
    target.zero_()
    copy = copy_call(source, target, MIB)
    copy()
    assert target[:MIB].equal(source[:MIB]) and not target[MIB:].any()
    copy()
    copy()
    assert target.equal(source)
    copy()  # from the beginning again


def test_host_copy(bench):
    transfer, _, _ = profile_lanes.host_copy(bench)
    assert transfer.bytes_per_second > 1e8
