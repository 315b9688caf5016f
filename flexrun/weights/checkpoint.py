"""One view of a model on disk, so that no other room knows which file format it came in."""

from __future__ import annotations

import abc
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from flexrun.core import nearest_name
from flexrun.errors import CheckpointError

SAMPLES, SAMPLE_BYTES = 64, 4096  # of a checkpoint's contents, to tell it from another one
CONVERT_ROWS_BYTES = 8 << 20  # how much a reader converts at a time, so a read costs little more than its result


class CheckpointReader(abc.ABC):
    """A checkpoint whose headers were validated when it was opened; tensors are read one at a time.

    config: contents of config.json as Hugging Face writes it (built from the metadata for GGUF).
    generation_config: contents of generation_config.json, {} where there is none.
    path: the directory or file that was opened.
    """

    config: dict
    generation_config: dict
    path: Path

    @abc.abstractmethod
    def names(self) -> set[str]:
        """Every tensor's name, in Hugging Face naming."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape. Raises CheckpointError when there is no such tensor."""

    @abc.abstractmethod
    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor on the CPU, contiguous, converted to ``dtype``; only its own bytes are read.

        Raises CheckpointError when the tensor is absent, its stored format cannot be read, or the file ends early.
        """

    def read_part(self, name: str, part: int, dtype: torch.dtype) -> torch.Tensor:
        """Entry ``part`` along the tensor's first dimension, as ``read`` would have it; may be a transposed view."""
        return self.read(name, dtype)[part]

    @abc.abstractmethod
    def file_of(self, name: str) -> Path:
        """The file that holds the tensor (for messages)."""

    @abc.abstractmethod
    def refusal(self, name: str) -> str | None:
        """Why the tensor's stored format cannot be read; None when it can."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hex sha256 over the config and each file's name, size, mtime_ns and header. Fast: reads no tensor."""

    @abc.abstractmethod
    def digest(self) -> str:
        """What a copy shares, but not other weights of the same shapes; see `digest_files`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the files. Safe to call twice."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def check_tensors(reader: CheckpointReader, required: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Raise one CheckpointError that lists every tensor that is missing, misshapen or unreadable, with its file."""
    names = reader.names()
    complaints, hint = [], None
    for name, shape in required:
        if name not in names:
            complaints.append(f"{reader.path}: tensor {name!r} is missing")
            hint = hint or nearest_name(name, _neighbours(name, names))
        elif tuple(reader.shape(name)) != tuple(shape):
            complaints.append(
                f"{reader.file_of(name)}: tensor {name!r} has shape {list(reader.shape(name))}, "
                f"the config needs {list(shape)}"
            )
        elif refusal := reader.refusal(name):
            complaints.append(f"{reader.file_of(name)}: tensor {name!r} {refusal}")
    if not complaints:
        return
    shown = complaints[:8]
    if len(complaints) > len(shown):
        shown.append(f"... and {len(complaints) - len(shown)} more")
    raise CheckpointError("\n".join(shown), hint or "config and weights disagree: download the checkpoint again")


def _neighbours(name: str, names: set[str]) -> list[str]:
    """Candidates for a suggestion: names with the same last parts, else the first few of all."""
    for parts in (3, 2, 1):
        suffix = ".".join(name.split(".")[-parts:])
        same = [known for known in names if known.endswith(suffix)]
        if same:
            return same
    return sorted(names)[:8]


def read_json(path: Path, required: bool) -> dict:
    """A JSON object from ``path``; {} where an optional file is absent. Raises CheckpointError naming the file."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if not required:
            return {}
        raise CheckpointError(f"{path} does not exist", f"a checkpoint needs {path.name}; download it again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}", "download the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}", "download the file again")
    return values


def fingerprint_files(config: dict, headers: dict[Path, bytes]) -> str:
    """Hex sha256 of the config and, for each file in name order, its name, size, mtime_ns and header bytes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path in sorted(headers):
        status = os.stat(path)
        digest.update(f"\0{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        digest.update(hashlib.sha256(headers[path]).digest())
    return digest.hexdigest()


def digest_files(config: dict, headers: dict[Path, bytes]) -> str:
    """16 hex digits for the config and, for each file in name order, its name, size, header bytes and some contents.

    These are SAMPLES blocks, spread evenly over all files, and the first of each: enough to see that a model was
    trained further, in well under a second. Raises CheckpointError naming a file that cannot be read.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    try:
        step_bytes = max(sum(map(os.path.getsize, headers)) // SAMPLES, SAMPLE_BYTES)
        for path in sorted(headers):
            with open(path, "rb", buffering=0) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                digest.update(f"\0{path.name}\0{size_bytes}\0".encode())
                digest.update(hashlib.sha256(headers[path]).digest())
                for offset_bytes in range(0, size_bytes, step_bytes):
                    digest.update(os.pread(file.fileno(), SAMPLE_BYTES, offset_bytes))
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be read: {error.strerror}", "check the disk"
        ) from error
    return digest.hexdigest()[:16]


def read_exactly(descriptor: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fill ``buffer`` from ``offset`` of a file. Raises CheckpointError naming ``what`` if the file ends early."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{what}: read failed: {error}", "check the disk and the file") from error
        if count == 0:
            raise CheckpointError(f"{what}: the file ended {len(buffer) - done} bytes early", "download the file again")
        done += count
