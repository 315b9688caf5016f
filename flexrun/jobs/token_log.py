"""Tokens of answers under way, kept pass by pass, so that a job that was stopped does not generate them again.

OUTPUT.tokens: a header (magic, job key), then a block a pass: count and CRC-32 as little-endian uint32, then ``count``
entries of ENTRY. What is lost of it costs time only, so damage ends what is read and is no error.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np

from flexrun.jobs.files import is_in_place, put_back, replace_file, sync_directory, write_all

MAGIC = b"FLEXRUN-TOKENS-1"
KEY_BYTES = 16
ENTRY = np.dtype([("line", "<u4"), ("choice", "<u4"), ("token", "<u4")])
BLOCK = struct.Struct("<II")
COMPACT_BYTES = 64 << 20  # smaller files are not worth rewriting

Partial = dict[int, dict[int, array]]  # line -> choice -> tokens so far


class TokenLog:
    """The log of one job. ``job_key``: bytes that tell this job from others; a log of another job counts as empty.

    Use: ``read`` what an earlier run left, ``start``, ``append`` after each pass, ``close``; ``remove`` once all is
    answered. ``sync`` may be called from another thread. File errors are raised as OSError.
    """

    def __init__(self, path: Path, job_key: bytes):
        self.path, self._header = path, MAGIC + job_key[:KEY_BYTES].ljust(KEY_BYTES, b"\0")
        self._file = None
        self._bytes = self._compact_above = 0
        self._guard = threading.Lock()

    def read(self) -> Partial:
        """Tokens of every answer in the log, up to the first damage."""
        partial: Partial = {}
        if self.path.exists():
            for line, choice, token in self._entries().tolist():
                partial.setdefault(line, {}).setdefault(choice, array("q")).append(token)
        return partial

    def start(self, kept: Collection[int]) -> None:
        """Begin to write; of an earlier run the tokens of the lines ``kept`` stay."""
        entries = self._entries() if kept and self.path.exists() else np.zeros(0, dtype=ENTRY)
        self._rewrite(entries[np.isin(entries["line"], np.fromiter(kept, dtype=np.uint32))])

    def append(self, entries: Iterable[tuple[int, int, int]], live: Callable[[], Collection[int]]) -> None:
        """Add (line, choice, token) of one pass. live: gives the lines under way, all that a smaller log must keep."""
        data = np.array(list(entries), dtype=ENTRY).tobytes()
        if not data:
            return
        block = BLOCK.pack(len(data) // ENTRY.itemsize, zlib.crc32(data)) + data
        write_all(self._file, block)
        self._bytes += len(block)
        if self._bytes > self._compact_above:
            entries = self._entries()
            self._rewrite(entries[np.isin(entries["line"], np.fromiter(live(), dtype=np.uint32))])

    def sync(self) -> None:
        """Put on the disk what was appended."""
        with self._guard:
            if self._file is not None:
                os.fsync(self._file.fileno())

    def put_back(self) -> None:
        """Where the file was taken away: write it again. What is lost of it costs time only."""
        if self._file is not None and not is_in_place(self._file, self.path):
            put_back(self._file, self.path)

    def close(self) -> None:
        """Let go of the file; it stays."""
        if self._file is not None:
            self.sync()
            with self._guard:
                self._file.close()
                self._file = None

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def _entries(self) -> np.ndarray:
        """ENTRY [tokens], in the order written."""
        data = self.path.read_bytes()
        blocks, place = [np.zeros(0, dtype=ENTRY)], len(self._header)
        while data.startswith(self._header) and place + BLOCK.size <= len(data):
            count, checksum = BLOCK.unpack_from(data, place)
            start = place + BLOCK.size
            place = start + count * ENTRY.itemsize
            if place > len(data) or zlib.crc32(data[start:place]) != checksum:
                break
            blocks.append(np.frombuffer(data, dtype=ENTRY, count=count, offset=start))
        return np.concatenate(blocks)

    def _rewrite(self, entries: np.ndarray) -> None:
        """Put these entries in the place of all others, and go on appending to them."""
        data = entries.tobytes()
        block = BLOCK.pack(len(entries), zlib.crc32(data)) + data if data else b""
        replace_file(self.path, lambda file: file.write(self._header + block))
        with self._guard:
            if self._file is not None:
                self._file.close()
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        self._bytes = len(self._header) + len(block)
        self._compact_above = max(COMPACT_BYTES, 4 * self._bytes)
        sync_directory(self.path.parent)
