"""Which query rows attend which KV rows: ragged sequences described by offsets, so that no tensor is padded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of one attention call; five int64 arrays of equal length, one entry a segment.

    Query rows ``[query_start, query_start + query_len)`` attend KV rows ``[kv_start, kv_start + kv_len)`` of the slab.
    Positions of a segment count from its first KV row: query row ``t`` has position ``p = query_position + t`` and
    attends KV rows ``max(0, p - window + 1) .. min(p, kv_len - 1)``.

    Without ``query_position`` the queries are the last ``query_len`` positions of a sequence whose KV rows are all
    here: ``query_position = kv_len - query_len``. With it the KV may be a part of a sequence (see ``split_kv``): the
    queries may lie behind it, partly in front of it (negative), and the part may be empty. A row that sees nothing
    gets zeros, and a log-sum-exp of -inf.

    Build it once and pass it to every layer: the checks and derived arrays are computed once.
    Raises ValueError where lengths differ or are out of range, or ``query_len > kv_len`` without ``query_position``.
    """

    query_start: numpy.ndarray
    query_len: numpy.ndarray
    kv_start: numpy.ndarray
    kv_len: numpy.ndarray
    query_position: numpy.ndarray | None = None

    def __post_init__(self):
        whole = self.query_position is None
        if whole:
            lengths = [numpy.asarray(length, dtype=numpy.int64) for length in (self.kv_len, self.query_len)]
            if lengths[0].shape != lengths[1].shape:
                raise ValueError("segments: the arrays must be flat and of equal length")
            object.__setattr__(self, "query_position", lengths[0] - lengths[1])
        for column in fields(self):
            array = numpy.ascontiguousarray(getattr(self, column.name), dtype=numpy.int64)
            object.__setattr__(self, column.name, array)
        shape = self.query_start.shape
        if len(shape) != 1 or any(getattr(self, column.name).shape != shape for column in fields(self)):
            raise ValueError("segments: the arrays must be flat and of equal length")
        if len(self) and (self.query_start.min() < 0 or self.kv_start.min() < 0):
            raise ValueError("segments: negative start")
        if len(self) and (self.query_len.min() < 1 or self.kv_len.min() < 0):
            raise ValueError("segments: need 1 <= query_len and 0 <= kv_len")
        if whole and len(self) and self.query_position.min() < 0:
            raise ValueError("segments: need query_len <= kv_len where no query_position is given")

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
        """int64 [5, segments]: query_start, query_len, kv_start, kv_len, query_position."""
        return numpy.stack([getattr(self, column.name) for column in fields(self)])

    @cached_property
    def rows(self) -> list[tuple[int, int, int, int]]:
        """``(query_start, query_len, kv_start, kv_len)`` of each segment as Python integers."""
        return list(zip(*self.table[:4].tolist()))

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

    def split_kv(self, first_tokens, second_start=None) -> tuple[Segments, Segments]:
        """The same queries over the first ``first_tokens`` KV rows of each segment, and over the rest.

        first_tokens: int64 [segments] or one number; longer than a segment leaves the second part empty.
        second_start: where the rest of each segment begins in a slab of its own; without it, behind the first part.
        Attending both and merging by log-sum-exp equals attending the whole: see ``attend_split``.
        """
        first_tokens = numpy.clip(numpy.asarray(first_tokens, dtype=numpy.int64), 0, self.kv_len)
        if second_start is None:
            second_start = self.kv_start + first_tokens
        queries = (self.query_start, self.query_len)
        return (
            Segments(*queries, self.kv_start, first_tokens, self.query_position),
            Segments(*queries, second_start, self.kv_len - first_tokens, self.query_position - first_tokens),
        )

    @cached_property
    def _splits(self) -> dict:
        return {}
