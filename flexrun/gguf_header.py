"""Parses the header of a GGUF file, since both the tokenizer and the weight reader live off its metadata.

Every length is checked against the file before it is used, so a damaged file gives an error and never a huge
allocation. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from flexrun.errors import CheckpointError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_DIMENSIONS = 4
DAMAGED = "the file is damaged or incomplete: download it again"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One stored tensor. ``shape`` is row-major (reversed from the file), ``offset_bytes`` from the file's start."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """All metadata and the table of tensors. ``digest`` is the sha256 of the header's bytes."""

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, GgufTensor]
    digest: bytes


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Parse and check the header. float32 metadata is given as the shortest decimal that rounds to it (1e-05).

    Raises CheckpointError naming the file and what is wrong in it, UnsupportedError for other format versions,
    big-endian files and files that are one part of a split model.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise CheckpointError(f"{path}: too short to be a GGUF file", DAMAGED)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


class _Parser:
    """A cursor over the file's bytes."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.position = 0

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file")
        version = self._scalar("I")
        if version not in VERSIONS:
            what = "is big-endian" if version & 0xFFFF == 0 else f"has GGUF version {version}"
            raise UnsupportedError(f"{self.path} {what}", f"convert it to GGUF version {VERSIONS[-1]}, little-endian")
        tensor_count, value_count = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, object] = {}
        for _ in range(value_count):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"the key {key!r} appears twice")
            metadata[key] = self._value(self._scalar("I"), key)
        if metadata.get("split.count", 0) not in (0, 1):
            raise UnsupportedError(f"{self.path} is one part of a split model", "join the parts with llama-gguf-split")
        entries = {}
        for _ in range(tensor_count):
            entry = self._entry()
            if entry[0] in entries:
                raise self._damaged(f"tensor {entry[0]!r} appears twice")
            entries[entry[0]] = entry
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment {alignment!r} is not a power of two")
        start_bytes = -(-self.position // alignment) * alignment
        tensors = {name: self._place(entry, start_bytes) for name, entry in entries.items()}
        digest = hashlib.sha256(memoryview(self.data)[: self.position]).digest()
        return GgufHeader(self.path, metadata, tensors, digest)

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise self._damaged("it ends inside its header")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def _scalar(self, code: str):
        layout = struct.Struct("<" + code)
        value = layout.unpack(self._take(layout.size))[0]
        return _shortest(value) if code == "f" else value

    def _string(self) -> str:
        raw = self._take(self._scalar("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._damaged("a text in its header is not UTF-8") from error

    def _value(self, kind: int, key: str):
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind != ARRAY:
            raise self._damaged(f"the value of {key!r} has unknown type {kind}")
        element, count = self._scalar("I"), self._scalar("Q")
        if element == STRING:
            if count * 8 > len(self.data) - self.position:
                raise self._damaged(f"the list {key!r} is longer than the file")
            return [self._string() for _ in range(count)]
        if element not in SCALARS:
            raise self._damaged(f"the list {key!r} has elements of unknown type {element}")
        layout = numpy.dtype("<" + SCALARS[element])
        return numpy.frombuffer(self._take(count * layout.itemsize), layout).tolist()

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _place(self, entry: tuple[str, tuple[int, ...], int, int], start_bytes: int) -> GgufTensor:
        name, shape, kind_number, offset_bytes = entry
        where = f"{self.path}: tensor {name!r}"
        try:
            kind = GGMLQuantizationType(kind_number)
            block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{where} has unknown quantisation type {kind_number}", DAMAGED) from error
        if shape[-1] % block_elements:
            raise CheckpointError(f"{where}: rows of {shape[-1]} do not fill blocks of {kind.name}", DAMAGED)
        size_bytes = math.prod(shape) // block_elements * block_bytes
        end_bytes = start_bytes + offset_bytes + size_bytes
        if end_bytes > len(self.data):
            raise CheckpointError(
                f"{where} ends at byte {end_bytes}, but the file has only {len(self.data)}: it is truncated", DAMAGED
            )
        return GgufTensor(name, kind.name, shape, start_bytes + offset_bytes, size_bytes)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged GGUF header: {what} (near byte {self.position})", DAMAGED)


def _shortest(value: float) -> float:
    """The float32 ``value`` as the double a person wrote: 9.999999747378752e-06 becomes 1e-05."""
    return float(str(numpy.float32(value)))
