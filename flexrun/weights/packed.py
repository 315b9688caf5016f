"""The packed weight cache: per-layer files whose tensors start on 4 KiB pages, so that reads can be large and direct.

A cache folder holds one file a layer, one for the embedding, one for the head, and ``manifest.json``, which
lists every tensor with its offset and CRC-32 and carries a SHA-256 of itself. The folder appears under its
final name only when all of it is on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from flexrun.compress import GroupFormat, WeightBits, quantise
from flexrun.core import DTYPES, PAGE_BYTES, align_up, format_bytes
from flexrun.errors import BudgetError, CheckpointError, ExecutionError, UnsupportedError
from flexrun.models.spec import ModelSpec
from flexrun.weights.checkpoint import CheckpointReader, check_tensors

FORMAT_VERSION = 1
COMPRESSED_VERSION = 3  # of the layout of compressed matrices, and of how weights are rounded
PLAIN = WeightBits()
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PackedEntry:
    """Where one tensor lies: ``file`` in the cache folder, page-aligned ``offset``, unpadded ``nbytes``.

    form: how it is compressed, None where it is in its dtype.
    """

    file: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    crc32: int
    form: GroupFormat | None = None


class PackedWeights:
    """An opened cache. ``entry(layer, name)`` finds a tensor; layer -1 is the embedding, num_layers the head."""

    def __init__(self, folder: Path, entries: dict[tuple[int, str], PackedEntry], dtype: str):
        self.folder = folder
        self.entries = entries
        self.dtype = dtype

    def entry(self, layer: int, name: str) -> PackedEntry:
        return self.entries[layer, name]

    def path(self, entry: PackedEntry) -> Path:
        return self.folder / entry.file

    def verify(self) -> None:
        """Read everything and compare checksums. Raises CheckpointError naming the file and the tensor."""
        for (_, name), entry in self.entries.items():
            with open(self.path(entry), "rb") as file:
                file.seek(entry.offset)
                crc, left = 0, entry.nbytes
                while left:
                    block = file.read(min(left, 1 << 22))
                    if not block:
                        break
                    crc, left = zlib.crc32(block, crc), left - len(block)
            if left or crc != entry.crc32:
                raise CheckpointError(
                    f"{self.path(entry)}: tensor {name} does not match its checksum",
                    f"delete {self.folder}; the next run packs the checkpoint again",
                )


def open_packed(
    reader: CheckpointReader,
    spec: ModelSpec,
    cache_dir: Path,
    *,
    name: str,
    progress: bool = True,
    bits: WeightBits = PLAIN,
) -> PackedWeights:
    """The packed cache of a checkpoint in ``spec.dtype``: reused where valid, written where not.

    bits: which matrices are compressed, from float32 and one by one. A changed checkpoint, or other bits, have another
    fingerprint and so another folder; older folders of the same model, dtype and bits of most matrices are removed.
    Two processes at once share one lock: the second waits and reuses.
    Raises CheckpointError for a bad checkpoint before anything is written, BudgetError where the disk is short,
    ExecutionError where it fails or others fill it meanwhile.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    bits.check(spec.tensors_by_layer())
    identity = f"{reader.fingerprint()}:{spec.dtype}:{FORMAT_VERSION}:{_layout(spec)}"
    if bits != PLAIN:
        identity += f":{bits!r}:{COMPRESSED_VERSION}"
    key = hashlib.sha256(identity.encode()).hexdigest()
    stem = _stem(spec, name, bits)
    folder = cache_dir / f"{stem}-{key[:16]}"
    with _lock(cache_dir / f"{stem}.lock"):
        packed = _load(folder, key)
        if packed is None:
            names = reader.names()
            needed = (
                (spec.find_source(source, names) or source, shape)
                for _, tensor in spec.tensors_by_layer()
                for source, shape in zip(tensor.sources, tensor.source_shapes)
            )
            check_tensors(reader, needed)
            unread = sorted(spec.unread_sources(names))
            if unread:
                raise UnsupportedError(
                    f"{reader.path}: the checkpoint holds tensors this architecture does not use, such as {unread[0]} "
                    f"({len(unread)} in all)",
                    "config.json and weights do not belong together, or it is a variant that flexrun does not run",
                )
            like = glob.escape(stem)
            for stale in [*cache_dir.glob(f".{like}-*.partial"), *cache_dir.glob(f"{like}-????????????????")]:
                shutil.rmtree(stale, ignore_errors=True)
            _write_or_nothing(reader, spec, folder, key, bits, progress)
            packed = _load(folder, key)
            if packed is None:
                raise CheckpointError(f"{folder}: the packed cache just written cannot be read back", "check the disk")
    return packed


def packed_bytes(spec: ModelSpec, cache_dir: Path, *, name: str, bits: WeightBits = PLAIN) -> int:
    """What the cache of a model takes on disk already, also an outdated one, which would be replaced."""
    folders = Path(cache_dir).glob(f"{glob.escape(_stem(spec, name, bits))}-????????????????")
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.bin"))


def _stem(spec: ModelSpec, name: str, bits: WeightBits) -> str:
    return f"{name}-{spec.dtype}" + ("" if bits == PLAIN else f"-w{bits.bits}")


def _layout(spec: ModelSpec) -> str:
    return repr(spec.tensors_by_layer())


def _file_name(layer: int, num_layers: int) -> str:
    return "embedding.bin" if layer < 0 else "head.bin" if layer == num_layers else f"layer-{layer:04d}.bin"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _load(folder: Path, key: str) -> PackedWeights | None:
    """The cache in ``folder``, or None where it is absent or not whole."""
    try:
        document = json.loads((folder / MANIFEST).read_text())
        body = document["body"]
        if document["sha256"] != _digest(body) or body["key"] != key:
            return None
        entries = {}
        for layer, name, file, offset, nbytes, shape, crc32, *form in body["tensors"]:
            compressed = GroupFormat(*form) if form else None
            entries[layer, name] = PackedEntry(file, offset, nbytes, tuple(shape), crc32, compressed)
        for file, size in body["files"].items():
            if (folder / file).stat().st_size != size:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return PackedWeights(folder, entries, body["dtype"])


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_or_nothing(
    reader: CheckpointReader, spec: ModelSpec, folder: Path, key: str, bits: WeightBits, progress: bool
) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        _write(reader, spec, folder, partial, key, bits, progress)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)  # its room may be what others now lack
        raise ExecutionError(
            f"packing the weights into {folder.parent} failed: {error.strerror or error}",
            "free some space, or give --disk-dir a folder on a larger disk",
        ) from error


def _write(
    reader: CheckpointReader,
    spec: ModelSpec,
    folder: Path,
    partial: Path,
    key: str,
    bits: WeightBits,
    progress: bool,
) -> None:
    dtype = DTYPES[spec.dtype]
    stored, names = [(*row, bits.of(*row)) for row in spec.tensors_by_layer()], reader.names()
    total_bytes = sum(
        align_up(tensor.elements * tensor.dtype_bytes(dtype) if form is None else form.nbytes(tensor.shape))
        for _, tensor, form in stored
    )
    free_bytes = shutil.disk_usage(folder.parent).free
    if total_bytes > free_bytes:
        raise BudgetError(
            f"packing needs {format_bytes(total_bytes)} in {folder.parent}, which has {format_bytes(free_bytes)} free",
            "give --disk-dir a folder on a larger disk",
        )
    partial.mkdir()
    rows, files = [], {}
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="packing weights", disable=not progress, leave=False)
    with bar, contextlib.ExitStack() as stack:
        out, current = None, None
        for layer, tensor, form in stored:
            file_name = _file_name(layer, spec.num_layers)
            if file_name != current:
                stack.close()  # syncs and closes the previous layer's file
                out, current = stack.enter_context(_synced(partial / file_name)), file_name
            sources = [spec.find_source(source, names) for source in tensor.sources]
            kept = DTYPES[tensor.dtype] if tensor.dtype else dtype if form is None else torch.float32
            part = tensor.part
            values = [
                reader.read(source, kept) if part is None else reader.read_part(source, part, kept)
                for source in sources
            ]
            value = tensor.build(values, kept)
            del values
            if form is not None:
                value = quantise(value, form, name=sources[0])
            data = value.view(torch.uint8).numpy().reshape(-1).data
            offset = out.tell()
            out.write(data)
            out.write(b"\0" * (align_up(len(data), PAGE_BYTES) - len(data)))
            row = [layer, tensor.name, file_name, offset, len(data), list(tensor.shape), zlib.crc32(data)]
            rows.append(row if form is None else [*row, form.bits, form.group, form.symmetric])
            files[file_name] = out.tell()
            bar.update(align_up(len(data)))
    body = {"key": key, "dtype": spec.dtype, "files": files, "tensors": rows}
    with _synced(partial / MANIFEST) as out:
        out.write(json.dumps({"sha256": _digest(body), "body": body}).encode())
    _sync_folder(partial)
    os.rename(partial, folder)
    _sync_folder(folder.parent)


@contextlib.contextmanager
def _synced(path: Path) -> Iterator:
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # do not fill RAM with what was just written


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
