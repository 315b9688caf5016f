"""Which query rows attend which KV rows: ragged sequences described by offsets, so that no tensor is padded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of one attention call; four int64 arrays of equal length, one entry a segment.

    Query rows ``[query_start, query_start + query_len)`` are the last ``query_len`` positions of the sequence whose
    KV rows are ``[kv_start, kv_start + kv_len)`` of the slab. Query row ``t`` of a segment has position
    ``p = kv_len - query_len + t`` and attends positions ``max(0, p - window + 1) .. p``.

    Build it once and pass it to every layer: the checks and derived arrays are computed once.
    Raises ValueError where lengths differ, are below 1, or ``query_len > kv_len``.
    """

    query_start: numpy.ndarray
    query_len: numpy.ndarray
    kv_start: numpy.ndarray
    kv_len: numpy.ndarray

    def __post_init__(self):
        for column in fields(self):
            array = numpy.ascontiguousarray(getattr(self, column.name), dtype=numpy.int64)
            object.__setattr__(self, column.name, array)
        shape = self.query_start.shape
        if len(shape) != 1 or any(getattr(self, column.name).shape != shape for column in fields(self)):
            raise ValueError("segments: the four arrays must be flat and of equal length")
        if len(self) and (self.query_start.min() < 0 or self.kv_start.min() < 0):
            raise ValueError("segments: negative start")
        if len(self) and (self.query_len.min() < 1 or (self.query_len > self.kv_len).any()):
            raise ValueError("segments: need 1 <= query_len <= kv_len")

    def __len__(self) -> int:
        return len(self.query_start)

    @cached_property
    def query_end(self) -> int:
        """One past the last query row used."""
        return int((self.query_start + self.query_len).max(initial=0))

    @cached_property
    def kv_end(self) -> int:
        """One past the last slab row used."""
        return int((self.kv_start + self.kv_len).max(initial=0))

    @cached_property
    def table(self) -> numpy.ndarray:
        """int64 [4, segments]: query_start, query_len, kv_start, kv_len."""
        return numpy.stack([getattr(self, column.name) for column in fields(self)])

    @cached_property
    def rows(self) -> list[tuple[int, int, int, int]]:
        """``(query_start, query_len, kv_start, kv_len)`` of each segment as Python integers."""
        return list(zip(*self.table.tolist()))

    @cached_property
    def pointer(self) -> int:
        """Address of ``table``, for native kernels."""
        return self.table.ctypes.data

    def split(self, query_tokens: int) -> tuple[Segments, Segments]:
        """(segments of at most ``query_tokens`` query rows, the longer ones); remembered for the next layer."""
        if query_tokens not in self._splits:
            short = self.query_len <= query_tokens
            self._splits[query_tokens] = (
                self if short.all() else Segments(*self.table[:, short]),
                Segments(*self.table[:, ~short]),
            )
        return self._splits[query_tokens]

    @cached_property
    def _splits(self) -> dict:
        return {}
