"""Makes any input (file, .gz, stdin) a seekable stream of lines, so that a job can go back to a line by its offset."""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flexrun.errors import ConfigError

MAX_LINE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def open_source(path: str | Path) -> BinaryIO:
    """A seekable binary file of the input at ``path``; ``-`` is stdin. Pipes and .gz are spooled to a temporary file.

    Raises ConfigError where the file is missing, unreadable, a broken gzip, or UTF-16.
    """
    try:
        source = _open_seekable(str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"input file {path} does not exist", "give the JSONL file with -i, or - for stdin") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"input file {path} is not a whole gzip file: {error}", "copy the file again") from error
    except OSError as error:
        raise ConfigError(f"input file {path} cannot be read: {error.strerror or error}") from error
    if source.read(2) in _UTF16_BOMS:
        source.close()
        raise ConfigError(f"input file {path} is UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8")
    source.seek(0)
    return source


def _open_seekable(path: str) -> BinaryIO:
    if path == "-":
        return _spool(sys.stdin.buffer)
    stream = open(path, "rb", buffering=_CHUNK_BYTES)  # noqa: SIM115 - handed to the caller
    if path.endswith(".gz"):
        with stream, gzip.open(stream) as unpacked:
            return _spool(unpacked)
    if not stream.seekable():
        with stream:
            return _spool(stream)
    return stream


def _spool(stream: BinaryIO) -> BinaryIO:
    spool = tempfile.TemporaryFile(prefix="flexrun-input-", buffering=_CHUNK_BYTES)  # noqa: SIM115 - handed on
    try:
        shutil.copyfileobj(stream, spool, _CHUNK_BYTES)
    except BaseException:
        spool.close()
        raise
    spool.seek(0)
    return spool


def read_lines(source: BinaryIO, digest) -> Iterator[tuple[int, int, bytes | None]]:
    """Yields (line number from 1, byte offset, content) of every line that is not blank, from the start.

    Line ends and a leading BOM are stripped; the content of a line over MAX_LINE_BYTES is None. Every byte passed
    goes into ``digest`` (a hashlib object).
    """
    source.seek(0)
    line, offset = 0, 0
    while raw := source.readline(MAX_LINE_BYTES):
        line += 1
        start, offset = offset, offset + len(raw)
        digest.update(raw)
        if line == 1 and raw.startswith(_UTF8_BOM):
            start, raw = start + len(_UTF8_BOM), raw[len(_UTF8_BOM) :]
        too_long = False
        while not raw.endswith(b"\n") and (rest := source.readline(_CHUNK_BYTES)):
            too_long, raw = True, rest
            offset += len(rest)
            digest.update(rest)
        if too_long:
            yield line, start, None
        elif content := raw.strip(b" \t\r\n"):
            yield line, start, content


def read_line_at(source: BinaryIO, offset: int) -> bytes:
    """The stripped content of the line that starts at byte ``offset``."""
    source.seek(offset)
    return source.readline(MAX_LINE_BYTES).strip(b" \t\r\n")


def digest_rest(source: BinaryIO, digest) -> None:
    """Feed what ``read_lines`` has not passed yet into ``digest``."""
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
