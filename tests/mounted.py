"""A child process with a file system of its own: as small as a test wants it, or read-only."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_NOSUID, MS_REMOUNT, MS_RDONLY = 2, 32, 1
NOT_ALLOWED = "mounting is not allowed here"


def run_mounted(folder: Path, size_bytes: int, work: Callable[[], object]) -> object:
    """What ``work()`` returns in a child with a tmpfs of so many bytes at ``folder``; what it raises fails the test.

    Skips the test where the kernel allows no namespaces.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(folder, size_bytes, work, theirs))
    child.start()
    theirs.close()
    try:
        assert ours.poll(60), "the child hangs"
        failure, result = ours.recv()
    finally:
        child.kill()
        child.join()
    if failure == NOT_ALLOWED:
        pytest.skip(NOT_ALLOWED)
    assert failure is None, failure
    return result


def set_read_only(folder: Path, read_only: bool) -> None:
    """Inside ``work``: let the mounted folder be written, or not."""
    _mount(None, folder, None, MS_REMOUNT | (MS_RDONLY if read_only else 0), None)


def _child(folder: Path, size_bytes: int, work: Callable[[], object], pipe) -> None:
    try:
        try:
            user, group = os.getuid(), os.getgid()
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNS):
                raise OSError
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                Path("/proc/self", name).write_text(text)
            _mount("none", folder, "tmpfs", MS_NOSUID, f"size={size_bytes}")
        except OSError:
            pipe.send((NOT_ALLOWED, None))
            return
        pipe.send((None, work()))
    except BaseException:
        pipe.send((traceback.format_exc(), None))


def _mount(source: str | None, target: Path, kind: str | None, flags: int, options: str | None) -> None:
    words = [None if word is None else str(word).encode() for word in (source, target, kind)]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(*words, ctypes.c_ulong(flags), None if options is None else options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
