"""Keeps finished answers safe while the job runs, and finds out after a stop what is left to do.

Beside OUTPUT stand OUTPUT.manifest.json (what the job was; kept), OUTPUT.tokens (answers under way; see token_log.py;
until all is answered) and OUTPUT.lock (only while it runs).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flexrun.errors import ConfigError, ExecutionError
from flexrun.jobs.files import (
    FileLock,
    WrittenRecords,
    is_in_place,
    put_back,
    read_records,
    replace_file,
    rewrite_records,
    sync_directory,
    write_all,
)
from flexrun.jobs.records import job_id_of
from flexrun.jobs.token_log import KEY_BYTES, Partial, TokenLog

SYNC_RECORDS = 256
SYNC_SECONDS = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LEARNT_ANSWERS = 1 << 14  # of an earlier run, from which lengths are learnt
CHOSEN = "chosen"  # of a manifest: what was left to the program, for a resume to repeat
_UNCOMPARED_KEYS = ("flexrun_version", CHOSEN)


@dataclass(frozen=True)
class Recovered:
    """What an earlier run left. ``lines``: int64, sorted, the input lines that need no work; the counts are records.

    partial: tokens of the answers that were under way. chosen: see CHOSEN. answers: int64 [answers, 4], the latest of
    them: line, choices, tokens of all of them, and whether none went to its limit.
    """

    lines: np.ndarray
    answered_count: int
    failed_count: int
    partial: Partial = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    answers: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), dtype=np.int64))

    @classmethod
    def nothing(cls) -> Recovered:
        return cls(np.zeros(0, dtype=np.int64), 0, 0)

    def __contains__(self, line: int) -> bool:
        position = int(np.searchsorted(self.lines, line))
        return position < len(self.lines) and self.lines[position] == line


class Journal:
    """Appends records in completion order: answers to ``output``, refusals to ``error_file`` (or ``output`` too).

    Use: construct (claims the files, touches nothing), ``recover`` when resuming, ``start``, ``append``...,
    ``finish``; ``close`` always. A record reaches the operating system at once and the disk within SYNC_SECONDS or
    SYNC_RECORDS, from a thread of its own, so that the engine never waits. Where a file system refuses, the
    journal raises ExecutionError and what it had taken is safe; files that are taken away meanwhile are put back.

    Raises ConfigError when the output exists and neither resume nor overwrite is set, or another process has it.
    """

    def __init__(
        self, output: str | Path, error_file: str | Path | None = None, *, resume: bool = False, overwrite: bool = False
    ):
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite contradict each other", "give one of them")
        self._streams = _is_stream(output)
        self._output = Path(output)
        self._error_file = None if error_file is None else Path(error_file)
        self._resume = resume
        self._locks: list[FileLock] = []
        self._answers: BinaryIO | None = None
        self._failures: BinaryIO | None = None
        self._tokens: TokenLog | None = None
        self._unsynced = 0
        self._manifest = b""
        self._sync_error: OSError | None = None
        self._taken_away = self._was_put_back = self._can_tell = False
        self._wake, self._stopping = threading.Event(), False
        self._syncer: threading.Thread | None = None
        if self._streams and resume:
            raise ConfigError(f"a job that writes to {output} cannot be resumed", "write to a file with -o FILE")
        for path in self._paths():
            try:
                _check_writable(path)
                is_taken = path.exists() and path.stat().st_size and not (resume or overwrite)
            except OSError as error:  # a name too long, say
                raise ConfigError(f"{path} cannot be written: {error.strerror}", "name another file") from error
            if is_taken:
                raise ConfigError(
                    f"{path} already exists", "go on with --resume, start again with --overwrite, or name another file"
                )
        if self._error_file == self._output:
            raise ConfigError("the output file and the error file are the same", "leave --error-file out to join them")
        try:
            for path in self._paths():
                real = Path(os.path.realpath(path))  # two names of one file are one file
                self._locks.append(FileLock(real.with_name(real.name + ".lock"), str(path)))
        except BaseException:
            self._release()
            raise

    def recover(self, manifest: Mapping[str, Any], retry_errors: bool = False) -> Recovered:
        """Check that the earlier run was of the same job, repair torn last lines, and tell which lines are done.

        retry_errors: take the earlier failures out of the files; their lines are to be done again.
        Raises ConfigError where the manifest differs, or is missing or damaged beside records of another job, and
        where a file is damaged in its middle; ExecutionError where it cannot be repaired.
        """
        present = [path for path in self._paths() if path.exists() and path.stat().st_size]
        if not self._resume or not (present or self._beside("tokens").exists()):
            return Recovered.nothing()
        with self._writing():
            return self._recover(present, manifest, retry_errors)

    def _recover(self, present: list[Path], manifest: Mapping[str, Any], retry_errors: bool) -> Recovered:
        unreadable = self._check_manifest(manifest)
        found = [(path, read_records(path)) for path in present]
        if unreadable is not None and any(records.jobs - {job_id_of(manifest)} for _, records in found):
            raise unreadable
        lines, answered_count, failed_count = [], 0, 0
        for path, records in found:
            if records.end < path.stat().st_size:
                os.truncate(path, records.end)
            if retry_errors and not records.answered.all():
                rewrite_records(path, records, np.flatnonzero(records.answered))
                lines.append(records.lines[records.answered])
            else:
                lines.append(records.lines)
                failed_count += int((~records.answered).sum())
            answered_count += int(records.answered.sum())
        done = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *lines]))
        partial = {} if self._streams else self._token_log(manifest).read()
        partial = {line: choices for line, choices in partial.items() if line not in done}
        chosen = {} if unreadable else json.loads(self._beside("manifest.json").read_text("utf-8")).get(CHOSEN, {})
        answers = [np.column_stack([records.lines, records.answers])[records.answered] for _, records in found]
        answers = np.concatenate([np.zeros((0, 4), dtype=np.int64), *answers])[-LEARNT_ANSWERS:]
        return Recovered(done, answered_count, failed_count, partial, chosen, answers)

    def start(self, manifest: Mapping[str, Any], kept: Collection[int] = ()) -> None:
        """Open the files for appending (emptied unless resuming) and write the manifest.

        kept: lines whose tokens of an earlier run are gone on with.
        """
        with self._writing():
            self._start(manifest, kept)

    def _start(self, manifest: Mapping[str, Any], kept: Collection[int]) -> None:
        if self._streams:
            # Opened by name, not by number, so that /dev/null and named pipes work as they do in a shell.
            self._answers = sys.stdout.buffer if str(self._output) == "-" else open(self._output, "wb")  # noqa: SIM115
        else:
            self._answers = self._open(self._output)
        self._failures = self._answers if self._error_file is None else self._open(self._error_file)
        self._can_tell = all(is_in_place(file, path) for file, path in self._open_files())  # inodes may change
        if not self._streams:
            # After the files were emptied: a manifest must never stand beside the answers of another job.
            self._manifest = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
            self._write_manifest()
            self._tokens = self._token_log(manifest)
            self._tokens.start(kept)
            self._syncer = threading.Thread(target=self._sync_loop, name="journal-sync", daemon=True)
            self._syncer.start()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. Raises ExecutionError where the file system refuses (disk full, ...)."""
        file = self._answers if record["error"] is None else self._failures
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        for other_line_end in "\x85\u2028\u2029":  # of those who read lines as Python's splitlines does
            text = text.replace(other_line_end, f"\\u{ord(other_line_end):04x}")
        data = text.encode("utf-8", "replace") + b"\n"
        with self._writing():
            write_all(file, data)
            file.flush()
        self._unsynced += 1
        if self._unsynced >= SYNC_RECORDS:
            self._wake.set()

    @property
    def keeps_tokens(self) -> bool:
        """Whether answers under way outlive the run: not those of a job that writes to a stream."""
        return self._tokens is not None

    def append_tokens(self, entries: Iterable[tuple[int, int, int]], live: Callable[[], Collection[int]]) -> None:
        """Keep (line, choice, token) of one pass. live: gives the lines under way. Raises as ``append``."""
        with self._writing():
            self._tokens.append(entries, live)
        self._unsynced += 1

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            if self._sync_error is not None:
                raise self._sync_error
            if not self._taken_away:
                yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self._taken_away |= bool(self._gone())
            if not self._taken_away:
                raise self._refused(error) from error
        if self._taken_away:
            raise self._put_back()

    def _refused(self, error: OSError) -> ExecutionError:
        remedies = {errno.ENOENT: "bring its folder back", **dict.fromkeys(_FULL, "free some space")}
        remedy = remedies.get(error.errno, "let it be written again")
        if self._streams:
            after = f"{remedy}, and start again: to a file (-o FILE), so that --resume can go on after the next one"
        else:
            after = f"{remedy}, then go on with --resume; nothing that was written is lost"
        return ExecutionError(f"cannot write {error.filename or self._output}: {error.strerror or error}", after)

    def _open_files(self) -> list[tuple[BinaryIO, Path]]:
        """The open files of a job that have a name of their own."""
        files = [] if self._streams else [(self._answers, self._output)]
        if self._error_file is not None:
            files.append((self._failures, self._error_file))
        return [(file, path) for file, path in files if file is not None and not file.closed]

    def _gone(self) -> list[tuple[BinaryIO, Path]]:
        """The open files that have lost their names; none where the file system cannot tell."""
        if not self._can_tell:
            return []
        return [(file, path) for file, path in self._open_files() if not is_in_place(file, path)]

    def _put_back(self) -> ExecutionError:
        """Write again what was removed, moved or replaced while it was written to. Returns the error that says so."""
        gone = self._gone()
        names = ", ".join(str(path) for _, path in gone)
        message = f"{names} was removed, moved or replaced while the job was running"
        try:
            places = [put_back(file, path) for file, path in gone]
            if not self._streams:
                self._write_manifest()
                if self._tokens is not None:
                    self._tokens.put_back()
        except OSError as error:
            return ExecutionError(
                f"{message}, and could not be written again: {error}",
                "bring the folder back; what is in it can be gone on with by --resume",
            )
        self._taken_away, self._was_put_back = False, True
        moves = [f"mv {place} {path}" for place, (_, path) in zip(places, gone) if place != path]
        hint = "everything was put back" if not moves else f"first put the answers back: {'; '.join(moves)}"
        return ExecutionError(message, f"{hint}; go on with --resume, and leave the files alone meanwhile")

    def _write_manifest(self) -> None:
        replace_file(self._beside("manifest.json"), lambda file: file.write(self._manifest))

    def finish(self, preserve_order: bool = False, *, keep_tokens: bool = False) -> None:
        """Make everything durable; with ``preserve_order`` put the records into the order of the input, atomically.

        keep_tokens: answers are still under way, for a resume to go on with.
        """
        self.close(keep_lock=True)
        with self._writing():
            if self._tokens is not None and not keep_tokens:
                self._tokens.remove()
            if preserve_order and not self._streams:
                for path in self._paths():
                    records: WrittenRecords = read_records(path)
                    rewrite_records(path, records, np.argsort(records.lines, kind="stable"))
        self._release()

    def close(self, keep_lock: bool = False) -> None:
        """Make everything durable and let go of the files. May be called twice."""
        self._stopping = True
        self._wake.set()
        if self._syncer is not None:
            self._syncer.join()
            self._syncer = None
        try:
            if not self._was_put_back:
                with self._writing():
                    self._sync()
                    if self._answers is not None and not self._answers.closed:
                        self._answers.flush()
        finally:
            for file in {self._answers, self._failures, self._tokens} - {None}:
                if file is not sys.stdout.buffer:
                    file.close()
            if not keep_lock:
                self._release()

    def _release(self) -> None:
        for lock in self._locks:
            lock.close()
        self._locks = []

    def _paths(self) -> list[Path]:
        answers = [] if self._streams else [self._output]
        return answers if self._error_file is None else [*answers, self._error_file]

    def _beside(self, ending: str) -> Path:
        return self._output.with_name(f"{self._output.name}.{ending}")

    def _token_log(self, manifest: Mapping[str, Any]) -> TokenLog:
        compared = {key: value for key, value in manifest.items() if key not in _UNCOMPARED_KEYS}
        key = hashlib.blake2b(json.dumps(compared, sort_keys=True).encode(), digest_size=KEY_BYTES).digest()
        return TokenLog(self._beside("tokens"), key)

    def _open(self, path: Path) -> BinaryIO:
        # Unbuffered: what a full disk refuses must not be tried again by close(). Readable: to be put back.
        file = open(path, "a+b" if self._resume else "w+b", buffering=0)  # noqa: SIM115 - closed by close()
        sync_directory(path.parent)
        return file

    def _sync_loop(self) -> None:
        while not (self._stopping or self._taken_away):
            self._wake.wait(SYNC_SECONDS)
            self._wake.clear()
            self._unsynced = 0  # before the call: a record written meanwhile counts for the next one
            try:
                self._sync()
            except OSError as error:
                self._sync_error = error

    def _sync(self) -> None:
        """Put on the disk what was written, and see that it still has its name."""
        for file, _ in self._open_files():
            os.fsync(file.fileno())
        self._taken_away |= bool(self._gone())
        if self._tokens is not None:
            self._tokens.sync()

    def _check_manifest(self, manifest: Mapping[str, Any]) -> ConfigError | None:
        """Raises ConfigError where it is of another job; returns the one to raise where it cannot be read."""
        path = self._beside("manifest.json")
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(before, dict):
                raise ValueError("not an object")
        except (FileNotFoundError, ValueError) as error:
            state = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
            return ConfigError(
                f"{path} is {state}, and the records of {self._output} are of another job",
                "resume with the same input, settings and version of flexrun, or start again with --overwrite",
            )
        now = json.loads(json.dumps(manifest))  # tuples become lists, as in the file
        for key, old, new in _differences({"weights": now.get("weights"), **before}, now):  # earlier versions: none
            raise ConfigError(
                f"{self._output} was made with {key}={json.dumps(old)}, this command has {key}={json.dumps(new)}",
                "resume with the same input and settings, or start again with --overwrite",
            )
        return None


def _differences(before: Any, now: Any, name: str = ""):
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}.difference(_UNCOMPARED_KEYS)):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def _is_stream(output: str | Path) -> bool:
    """True for ``-`` and for what exists but is no regular file: a pipe, a terminal, /dev/null."""
    if str(output) == "-":
        return True
    try:
        mode = os.stat(output).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a directory", "name a file")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"the folder of {path} does not exist", f"make it first: mkdir -p {folder}")
    for place in (folder, path):
        if place.exists() and not os.access(place, os.W_OK):
            raise ConfigError(
                f"{place} cannot be written", "name an output elsewhere, or check its permissions and its file system"
            )
