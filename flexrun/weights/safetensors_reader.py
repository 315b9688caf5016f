"""Reads safetensors checkpoints by byte range, so that a model larger than RAM can be converted tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from flexrun.errors import CheckpointError
from flexrun.weights.checkpoint import (
    CONVERT_ROWS_BYTES,
    CheckpointReader,
    digest_files,
    fingerprint_files,
    read_exactly,
    read_json,
)
from flexrun.weights.quantized import parts_of, quantized_tensors

INDEX_NAME = "model.safetensors.index.json"
LARGEST_HEADER_BYTES = 100_000_000  # the format's own limit
READABLE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bits of each element of the types the format knows; those not in READABLE may lie in a file but are not weights here.
ELEMENT_BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8},
    **{f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: ``offset_bytes`` from the start of ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


def read_header(path: Path) -> tuple[dict[str, StoredTensor], bytes]:
    """The tensors of one file and its raw header. Raises CheckpointError naming the file and the tensor at fault."""
    try:
        file_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= header_bytes <= min(LARGEST_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or cut off inside its header ({file_bytes} bytes)",
                    "download the file again",
                )
            raw = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "download the file again") from error
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}", "download the file again") from error
    header.pop("__metadata__", None)
    start_bytes = 8 + header_bytes
    tensors = {name: _entry(path, name, entry, start_bytes, file_bytes) for name, entry in header.items()}
    end_bytes = start_bytes
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset_bytes, item[1].size_bytes)):
        if tensor.offset_bytes != end_bytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} leaves a gap or overlaps its neighbour", "download the file again"
            )
        end_bytes += tensor.size_bytes
    if end_bytes != file_bytes:
        raise CheckpointError(
            f"{path}: {file_bytes - end_bytes} bytes follow the last tensor", "download the file again"
        )
    return tensors, raw


def _unique(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name appears twice")
    return values


def _entry(path: Path, name: str, entry: object, start_bytes: int, file_bytes: int) -> StoredTensor:
    where = f"{path}: tensor {name!r}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, begin, end]
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in whole):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{where} has a damaged header entry", "download the file again") from error
    if not isinstance(dtype, str) or dtype not in ELEMENT_BITS:
        raise CheckpointError(
            f"{where} has unknown dtype {dtype!r}", f"convert the weights to one of {', '.join(READABLE)}"
        )
    if (end - begin) * 8 != math.prod(shape) * ELEMENT_BITS[dtype]:
        raise CheckpointError(
            f"{where} spans {end - begin} bytes, but shape {shape} of {dtype} needs "
            f"{math.prod(shape) * ELEMENT_BITS[dtype] // 8}",
            "download the file again",
        )
    if start_bytes + end > file_bytes:
        raise CheckpointError(
            f"{where} ends at byte {start_bytes + end}, but the file has only {file_bytes}: it is truncated",
            "download the file again",
        )
    return StoredTensor(path, dtype, tuple(shape), start_bytes + begin, end - begin)


class SafetensorsReader(CheckpointReader):
    """A directory with config.json and either model.safetensors, shards with their index, or one *.safetensors."""

    def __init__(self, path: str | Path):
        """Read and check every header. Raises CheckpointError naming the file (and tensor) at fault, UnsupportedError
        naming a quantization_config that is not read."""
        self.path = Path(path)
        self.config = read_json(self.path / "config.json", required=True)
        self.generation_config = read_json(self.path / "generation_config.json", required=False)
        self._headers: dict[Path, bytes] = {}
        self._tensors: dict[str, StoredTensor] = {}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        index_path = self.path / INDEX_NAME
        if not (self.path / "model.safetensors").exists() and index_path.exists():
            self._open_shards(index_path)
        else:
            self._tensors = self._header(self._single_file())
        self._quantized = quantized_tensors(self.config, self._tensors)
        self._hidden = parts_of(self._quantized.values()) - set(self._quantized)

    def _single_file(self) -> Path:
        whole = self.path / "model.safetensors"
        if whole.exists():
            return whole
        found = sorted(self.path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"{self.path} has {len(found)} safetensors files but no {INDEX_NAME}", f"download {INDEX_NAME} too"
            )
        raise CheckpointError(f"{self.path} has no safetensors files", "give the directory of a model")

    def _open_shards(self, index_path: Path) -> None:
        weight_map = read_json(index_path, required=True).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path}: it has no weight_map", "download the file again")
        shards: dict[str, dict[str, StoredTensor]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(f"{index_path}: tensor {name!r} names the file {shard!r} outside the directory")
            if shard not in shards:
                if not (self.path / shard).exists():
                    raise CheckpointError(
                        f"{self.path / shard}: this shard is missing; tensor {name!r} should be in it",
                        f"download {shard} into {self.path}",
                    )
                shards[shard] = self._header(self.path / shard)
            if name not in shards[shard]:
                raise CheckpointError(
                    f"{self.path / shard}: tensor {name!r} is named in {INDEX_NAME} but is not in this file",
                    "the shards come from different downloads: download all of them again",
                )
            self._tensors[name] = shards[shard][name]

    def _header(self, path: Path) -> dict[str, StoredTensor]:
        tensors, self._headers[path] = read_header(path)
        return tensors

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing") from None

    def names(self) -> set[str]:
        return (set(self._tensors) | set(self._quantized)) - self._hidden

    def shape(self, name: str) -> tuple[int, ...]:
        return self._quantized[name].shape if name in self._quantized else self._stored(name).shape

    def file_of(self, name: str) -> Path:
        return self._stored(self._quantized[name].values if name in self._quantized else name).path

    def refusal(self, name: str) -> str | None:
        if name in self._quantized:
            return self._quantized[name].complaint
        dtype = self._stored(name).dtype
        return None if dtype in READABLE else f"is stored as {dtype}; only {', '.join(READABLE)} weights run"

    def fingerprint(self) -> str:
        return fingerprint_files(self.config, self._headers)

    def digest(self) -> str:
        return digest_files(self.config, self._headers)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        self._check_readable(name)
        if name in self._quantized:
            return self._quantized[name].read(None, dtype, self._tensors, self._bytes)
        stored = self._stored(name)
        return self._read(stored, stored.shape, 0, dtype, f"{stored.path}: tensor {name!r}")

    def read_part(self, name: str, part: int, dtype: torch.dtype) -> torch.Tensor:
        self._check_readable(name)
        if name in self._quantized:
            return self._quantized[name].read(part, dtype, self._tensors, self._bytes)
        stored = self._stored(name)
        part_bytes = stored.size_bytes // stored.shape[0]
        return self._read(stored, stored.shape[1:], part * part_bytes, dtype, f"{stored.path}: tensor {name!r}")

    def _check_readable(self, name: str) -> None:
        if refusal := self.refusal(name):
            raise CheckpointError(
                f"{self.file_of(name)}: tensor {name!r} {refusal}", "convert the weights to bfloat16 or float16 first"
            )

    def _bytes(self, name: str, offset_bytes: int, nbytes: int) -> torch.Tensor:
        stored, data = self._stored(name), torch.empty(nbytes, dtype=torch.uint8)
        where = f"{stored.path}: tensor {name!r}"
        read_exactly(self._descriptor(stored.path), _bytes_of(data), stored.offset_bytes + offset_bytes, where)
        return data

    def _read(
        self, stored: StoredTensor, shape: tuple[int, ...], skip_bytes: int, dtype: torch.dtype, where: str
    ) -> torch.Tensor:
        descriptor = self._descriptor(stored.path)
        offset_bytes = stored.offset_bytes + skip_bytes
        result = torch.empty(shape, dtype=dtype)
        flat = result.view(-1)
        if READABLE[stored.dtype] == dtype:
            if flat.numel():
                read_exactly(descriptor, _bytes_of(flat), offset_bytes, where)
            return result
        element_bytes = ELEMENT_BITS[stored.dtype] // 8
        step = CONVERT_ROWS_BYTES // element_bytes
        staging = torch.empty(min(step, flat.numel()), dtype=READABLE[stored.dtype])
        for start in range(0, flat.numel(), step):
            part = staging[: min(step, flat.numel() - start)]
            read_exactly(descriptor, _bytes_of(part), offset_bytes + start * element_bytes, where)
            flat[start : start + part.numel()].copy_(part)
        return result

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
            return self._descriptors[path]

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())
