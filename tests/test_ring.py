"""Regions of the streaming ring: taken in order, never overlapping while they are in use."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexrun.core import Lane
from flexrun.errors import BudgetError
from flexrun.streaming import Ring


@given(st.integers(1, 30), st.lists(st.integers(1, 30), max_size=40), st.randoms(use_true_random=False))
def test_ring_regions_in_use_never_overlap(capacity, sizes, chooser):
    """Regions are released in order, each at a random moment; what a new one overlaps must be waited for."""
    ring = Ring(capacity)
    held: deque[tuple[int, int, list]] = deque()  # not yet released
    released: dict[int, tuple[int, int]] = {}  # consumer -> bytes it used, until somebody waits for it
    consumer = 0
    for size in (size for size in sizes if size <= capacity):
        while True:
            while held and chooser.random() < 0.4:
                start, end, region = held.popleft()
                Ring.release(region, (Lane.CPU, consumer))
                released[consumer] = (start, end)
                consumer += 1
            taken = ring.take(size)
            if taken is not None:
                break
            assert held, "an empty ring refuses what fits it"
        offset, region, waits = taken
        assert 0 <= offset <= capacity - size
        for _, order in waits:
            del released[order]
        for start, end in [*((start, end) for start, end, _ in held), *released.values()]:
            assert offset + size <= start or end <= offset
        held.append((offset, offset + size, region))


def test_a_unit_larger_than_the_ring_is_refused():
    with pytest.raises(BudgetError, match="does not fit the streaming buffer of 8"):
        Ring(8).take(9)
