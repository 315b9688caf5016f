"""How thorough a measurement is: what is timed, at which sizes and for how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from flexrun.hardware.timing import Reading, Stopwatch, read_all, wall_clock

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Shape:
    """A llama-like layer."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int


SMALL = Shape(576, 9, 3, 1536)  # SmolLM2-135M
MIDDLE = Shape(2048, 32, 8, 8192)  # Llama-3.2-1B
LARGE = Shape(4096, 32, 8, 8192)
TINY = Shape(64, 4, 1, 128)  # so little work that what is left is the overhead of a step


@dataclass(frozen=True)
class Effort:
    """shapes, rows: layers timed and token rows a call. pool_bytes: weights or KV that repeats cycle through.

    reading_seconds, least_repeats: given to one reading. contention_seconds: given to one lane or pair of lanes.
    file_bytes: of the scratch file; disk_seconds: after which writing it stops. copy_sizes, disk_sizes, link_sizes:
    bytes of one request.
    """

    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    pool_bytes: int
    reading_seconds: float
    least_repeats: int
    contention_seconds: float
    file_bytes: int
    disk_seconds: float
    copy_sizes: tuple[int, ...]
    disk_sizes: tuple[int, ...]
    link_sizes: tuple[int, ...]
    context_tokens: int = 512
    vocabulary: int = 49152
    sampled_rows: int = 64


FULL = Effort(
    shapes=(SMALL, MIDDLE, LARGE),
    rows=(1, 4, 16, 64, 256, 512),
    pool_bytes=256 * MIB,
    reading_seconds=0.15,
    least_repeats=4,
    contention_seconds=0.5,
    file_bytes=1024 * MIB,
    disk_seconds=5.0,
    copy_sizes=(64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB),
    disk_sizes=(64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB),
    link_sizes=(64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB),
)
QUICK = Effort(
    shapes=(SMALL, MIDDLE),
    rows=(1, 8, 64, 256),
    pool_bytes=128 * MIB,
    reading_seconds=0.03,
    least_repeats=2,
    contention_seconds=0.13,
    file_bytes=256 * MIB,
    disk_seconds=1.0,
    copy_sizes=(64 * KIB, MIB, 16 * MIB, 64 * MIB),
    disk_sizes=(64 * KIB, 4 * MIB, 32 * MIB, 128 * MIB),
    link_sizes=(64 * KIB, 4 * MIB, 64 * MIB),
)


@dataclass(frozen=True)
class Bench:
    """Where readings are taken. label: what the processor is called in notes. cache_bytes: of its largest cache.

    warm_up: calls before a reading. advance: told what comes next.
    """

    effort: Effort
    label: str = "cpu"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stopwatch: Stopwatch = wall_clock
    warm_up: int = 1
    cache_bytes: int = 0
    advance: Callable[[str], None] = lambda stage: None

    @property
    def pool_bytes(self) -> int:
        """More than any cache keeps until it is read again."""
        return max(self.effort.pool_bytes, 4 * self.cache_bytes)

    def read_all(self, calls: Sequence[Callable[[], object]], **settings) -> list[Reading]:
        settings = {
            "warm_up": self.warm_up,
            "stopwatch": self.stopwatch,
            "least": self.effort.least_repeats,
            **settings,
        }
        return read_all(calls, self.effort.reading_seconds, **settings)
