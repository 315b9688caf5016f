"""Makes any input (file, gzip, zstd, stdin) a seekable stream of lines: a job goes back to a line by its offset."""

from __future__ import annotations

import gzip
import importlib
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from flexrun.errors import ConfigError

MAX_LINE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by their first bytes, which no JSON begins with
_ENDINGS = {".gz": "gzip", ".zst": "zstd"}


def open_source(path: str | Path) -> BinaryIO:
    """A seekable binary file of the input at ``path``; ``-`` is stdin.

    Pipes and what is packed with gzip or zstd are spooled to a temporary file. Raises ConfigError where the input is
    missing, unreadable, damaged, UTF-16, or zstd and no library for that is there.
    """
    try:
        source = _open_seekable(str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"input file {path} does not exist", "give the JSONL file with -i, or - for stdin") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"input file {path} is not a whole gzip file: {error}", "copy the file again") from error
    except OSError as error:
        raise ConfigError(
            f"input file {path} cannot be read: {error.strerror or error}", "give a file of lines that you may read"
        ) from error
    if source.read(2) in _UTF16_BOMS:
        source.close()
        raise ConfigError(f"input file {path} is UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8")
    source.seek(0)
    return source


def _open_seekable(path: str) -> BinaryIO:
    if path == "-":
        return _unpacked(_spool(sys.stdin.buffer), path)
    stream = open(path, "rb", buffering=_CHUNK_BYTES)  # noqa: SIM115 - handed to the caller
    if stream.seekable():
        return _unpacked(stream, path)
    with stream:
        return _unpacked(_spool(stream), path)


def _unpacked(stream: BinaryIO, path: str) -> BinaryIO:
    """The stream itself, or what was packed in it."""
    start = stream.read(4)
    stream.seek(0)
    kinds = [kind for magic, kind in _PACKED.items() if start.startswith(magic)]
    kind = kinds[0] if kinds else _ENDINGS.get(Path(path).suffix)
    if kind is None:
        return stream
    with stream:
        if kind == "zstd":
            return _spool(_ZstdReader(stream, path))
        with gzip.open(stream) as unpacked:
            return _spool(unpacked)


class _ZstdReader:
    """What one or several zstd frames hold, as a stream to read. Raises ConfigError as ``open_source``."""

    def __init__(self, stream: BinaryIO, path: str):
        self._stream, self._path = stream, path
        self._new = _zstd_decompressor(path)
        self._frame, self._left = self._new(), b""

    def read(self, size: int) -> bytes:
        while chunk := self._left or self._stream.read(size):
            if self._frame.eof:
                self._frame = self._new()
            try:
                data = self._frame.decompress(chunk)
            except Exception as error:  # each library has its own class
                raise self._broken(str(error)) from error
            self._left = self._frame.unused_data if self._frame.eof else b""
            if data:
                return data
        if not self._frame.eof:
            raise self._broken("it ends too early")
        return b""

    def _broken(self, complaint: str) -> ConfigError:
        return ConfigError(f"input file {self._path} is not a whole zstd file: {complaint}", "copy the file again")


def _zstd_decompressor(path: str) -> Callable:
    """Makes decompressors of one frame, from whichever library there is: Python 3.14 has one."""
    for module in ("compression.zstd", "zstandard"):
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        new = found.ZstdDecompressor().decompressobj if module == "zstandard" else found.ZstdDecompressor
        if hasattr(new(), "unused_data"):  # zstandard before 0.19 does not tell where a frame ends
            return new
    raise ConfigError(
        f"input file {path} is packed with zstd, and this Python cannot read that",
        "pip install -U zstandard, or unpack it on the way: zstd -dc FILE | flexrun run -i - ...",
    )


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
