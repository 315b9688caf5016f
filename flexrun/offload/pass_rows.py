"""Rows of a pass by their numbers in the pass, wherever they are: whole on the device, or two parts of it at a time."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from torch import Tensor


class Places:
    """Where the rows of the pass at hand are in buffers of two places of ``part_tokens`` rows each."""

    def __init__(self, part_tokens: int):
        self._part_tokens = part_tokens
        self._starts, self._shifts = [0], [0]

    def begin(self, part_starts: Sequence[int]) -> None:
        """Take up a pass cut at these rows, its parts by turns in either place; none: it is there as a whole."""
        self._starts = list(part_starts) or [0]
        self._shifts = [start - number % 2 * self._part_tokens for number, start in enumerate(self._starts)]

    @property
    def in_parts(self) -> bool:
        return len(self._starts) > 1

    def part_of(self, row: int) -> int:
        """Number of the part that a row belongs to."""
        return bisect.bisect_right(self._starts, row) - 1

    def of(self, rows: slice) -> slice:
        """Where rows of one part are."""
        shift = self._shifts[self.part_of(rows.start)]
        return slice(rows.start - shift, rows.stop - shift)


class PassRows:
    """A buffer [rows, ...] that is indexed with rows of the pass at hand, slices within one part of it."""

    def __init__(self, data: Tensor, places: Places):
        self.data, self._places = data, places

    def __getitem__(self, rows: slice) -> Tensor:
        return self.data[self._places.of(rows)]

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        self.data[self._places.of(rows)] = values
