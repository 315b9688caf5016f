"""The nouns every room shares: tiers, lanes, dtypes, byte sizes, measured events, strict configs."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flexrun.errors import ConfigError

PAGE_BYTES = 4096  # alignment of O_DIRECT reads and of everything in a packed file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tier(str, enum.Enum):
    """A place where tensors live."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


class Lane(str, enum.Enum):
    """A resource that does one step at a time; lanes run concurrently."""

    GPU = "gpu"
    CPU = "cpu"
    H2D = "h2d"
    D2H = "d2h"
    DISK_READ = "disk_read"
    DISK_WRITE = "disk_write"

    __hash__ = str.__hash__  # Enum's own is several times slower, and plans look lanes up by the million


@dataclass(frozen=True, slots=True)
class Event:
    """One executed step, as measured (or as simulated): the row of a timeline.

    Times are seconds on one monotonic clock, ``bytes`` moved and ``flops`` done are the step's own.
    """

    name: str
    lane: Lane
    start_seconds: float
    end_seconds: float
    pass_index: int = 0
    layer: int = -1
    bytes: int = 0
    flops: int = 0


class EventLog(list):
    """The first MOST_EVENTS events of a run: more would fill the memory of a long one, and no viewer shows them."""

    MOST_EVENTS = 500_000

    def append(self, event: Event) -> None:
        if len(self) < self.MOST_EVENTS:
            super().append(event)


_SIZE = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)


def parse_bytes(text: str | int | float) -> int:
    """Bytes from ``"1GiB"``, ``"1.5GB"``, ``"512M"`` or a number. ``G``/``GiB`` are 2^30, ``GB`` is 10^9.

    Raises ConfigError for anything else, also for a negative number.
    """
    is_number = isinstance(text, (int, float)) and not isinstance(text, bool)
    if is_number and 0 <= text < float("inf"):
        return int(text)
    match = None if is_number else _SIZE.match(str(text))
    if not match:
        raise ConfigError(f"cannot read {text!r} as a size in bytes", "write for example 8GiB, 1.5GB or 512MiB")
    number, prefix, binary = match.groups()
    exponent = " kmgt".index(prefix.lower() or " ")
    decimal = bool(prefix) and not binary and str(text).strip().lower().endswith("b")
    return int(float(number) * (1000 if decimal else 1024) ** exponent)


def format_bytes(count: float) -> str:
    """``1536`` → ``"1.5 KiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def align_up(count: int, alignment: int = PAGE_BYTES) -> int:
    return -(-count // alignment) * alignment


def nearest_name(name: str, known: typing.Iterable[str]) -> str:
    """A hint that suggests the closest known name, or lists what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known names: {', '.join(known)}"


def strict_dataclass(cls, values: Mapping, where: str):
    """Build frozen dataclass ``cls`` from a mapping, refusing unknown keys with the nearest known name.

    Nested dataclass fields accept mappings. Raises ConfigError naming ``where`` and the key.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected an object, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    arguments = {}
    for key, value in values.items():
        if key not in names:
            raise ConfigError(f"{where}: unknown key {key!r}", nearest_name(str(key), names))
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            value = strict_dataclass(hints[key], value, f"{where}.{key}")
        elif dataclasses.is_dataclass(hints[key]) and not isinstance(value, hints[key]):
            raise ConfigError(f"{where}.{key}: expected an object, got {type(value).__name__}")
        arguments[key] = value
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
