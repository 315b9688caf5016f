"""The file work under the journal: a lock against two writers, atomic replacement, reading back what was written,
and putting back what was taken away meanwhile."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import stat
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flexrun.errors import ConfigError
from flexrun.jobs.records import RECORD_START, record_job, record_lengths, record_line

MOST_SHOWN = 20
COPY_BYTES = 1 << 20


class FileLock:
    """An exclusive lock on ``path`` for as long as the object lives unclosed; it ends with the process at the latest.

    Raises ConfigError if another process holds it.
    """

    def __init__(self, path: Path, purpose: str):
        self.path = path
        while True:
            try:
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise ConfigError(
                    f"{path} cannot be made: {error.strerror}", "name an output in a folder that can be written"
                ) from error
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._descriptor)
                raise ConfigError(
                    f"another flexrun is writing {purpose}", "wait for it to end, or choose another output file"
                ) from error
            # The holder before us may have removed the file between our open and our lock.
            try:
                if os.stat(path).st_ino == os.fstat(self._descriptor).st_ino:
                    return
            except FileNotFoundError:
                pass
            os.close(self._descriptor)

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


@dataclass(frozen=True)
class WrittenRecords:
    """What a result file holds. lines, offsets, sizes: int64 [records]; answered: bool [records], status 200.
    answers: int64 [records, 3], of an answer its choices, the tokens of all, and whether none went to its limit.
    end: byte offset after the last whole record. jobs: ids of the jobs that wrote them.
    """

    lines: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    answered: np.ndarray
    answers: np.ndarray
    end: int
    jobs: frozenset[str]


def read_records(path: Path) -> WrittenRecords:
    """Scan a result file. A last line that is torn is left out (``end`` is before it).

    Raises ConfigError for lines that are no record of ours with records after them, and for a file that holds none and
    does not begin as one: what a resume takes for torn it cuts off.
    """
    lines, offsets, sizes, answered, answers = array("q"), array("q"), array("q"), bytearray(), array("q")
    end = offset = 0
    jobs: set[str] = set()
    broken: list[int] = []  # lines with records after them
    doubtful: list[int] = []  # lines that may be the torn end
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            start, offset = offset, offset + len(raw)
            try:
                if not raw.endswith(b"\n"):
                    raise ValueError("torn")
                record = json.loads(raw)
                line, status = record_line(record), (record["response"] or {}).get("status_code")
                jobs.add(record_job(record))
                lengths = record_lengths(record)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
                doubtful.append(number)
                continue
            broken += doubtful
            doubtful.clear()
            lines.append(line)
            offsets.append(start)
            sizes.append(len(raw))
            answered.append(status == 200)
            answers.extend(lengths)
            end = offset
    if broken:
        shown = broken[:MOST_SHOWN]
        more = f" and {len(broken) - len(shown):,} more" if len(broken) > len(shown) else ""
        raise ConfigError(
            f"{path} line {', '.join(map(str, shown))}{more}: no record of this job, and whole records follow",
            "take such lines out, and --resume answers them again: "
            f"sed -i '{';'.join(f'{number}d' for number in shown)}' {shlex.quote(str(path))}",
        )
    if doubtful and not lines and not _begins_as_record(path):
        raise ConfigError(
            f"{path} holds no answers of flexrun", "resume with the output file of the job, or name a new one without"
        )
    columns = [np.array(column, dtype=np.int64) for column in (lines, offsets, sizes)]
    answers = np.array(answers, dtype=np.int64).reshape(-1, 3)
    return WrittenRecords(*columns, np.frombuffer(bytes(answered), dtype=bool), answers, end, frozenset(jobs))


def _begins_as_record(path: Path) -> bool:
    """Whether the first record may have been torn here; what never reached the disk is zeros."""
    with open(path, "rb") as file:
        start = file.read(len(RECORD_START))
    return RECORD_START.startswith(start) or not start.strip(b"\0")


def check_distinct(files: Mapping[str, str | None]) -> None:
    """files: path by what it is for. Raises ConfigError where two are one file by whatever names: one would replace the
    other."""
    purposes: dict[object, str] = {}
    for purpose, path in files.items():
        if path is None or path == "-":
            continue
        place = os.path.realpath(path)
        try:
            status = os.stat(place)
            if not stat.S_ISREG(status.st_mode):
                continue
            place = status.st_dev, status.st_ino
        except OSError:
            pass
        if place in purposes:
            raise ConfigError(f"{purposes[place]} and {purpose} are the same: {path}", f"name another {purpose[4:]}")
        purposes[place] = purpose


def rewrite_records(path: Path, records: WrittenRecords, order: Iterable[int]) -> None:
    """Replace ``path`` atomically by its records picked in ``order``."""

    def copy(target: BinaryIO) -> None:
        with open(path, "rb") as source:
            for position in order:
                source.seek(int(records.offsets[position]))
                target.write(source.read(int(records.sizes[position])))

    replace_file(path, copy)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside ``path`` with ``write(file)``, make it durable, then put it in the place of ``path``."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write all of ``data``: of an unbuffered file a nearly full disk takes a part and says so only the next time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def is_in_place(file: BinaryIO, path: Path) -> bool:
    """Whether the open ``file`` is still the one at ``path``."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False


def put_back(file: BinaryIO, path: Path) -> Path:
    """Copy an open file that is no longer at ``path`` to there, or beside what is there now. Returns where it is."""
    target = path.with_name(path.name + ".rescued") if path.exists() else path
    target.parent.mkdir(parents=True, exist_ok=True)

    def copy(copied: BinaryIO) -> None:
        offset = 0
        while chunk := os.pread(file.fileno(), COPY_BYTES, offset):
            copied.write(chunk)
            offset += len(chunk)

    replace_file(target, copy)
    return target


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, as fsync does for contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
