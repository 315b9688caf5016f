"""Which rows of a pass attend which shared prefixes: neighbours of one prefix together, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from flexrun.attention import Segments
from flexrun.offload.prefix_cache import Chain


@dataclass(frozen=True, slots=True)
class PrefixLevel:
    """Rows ``[start, stop)`` of a micro-batch hold all that attend a prefix of one level: the first that a prompt has,
    or the one behind that, and so on. Segments index them from ``start``, and KV rows of the prefixes' slabs.

    together: rows of one prefix as one segment, which see all of it. each: every sequence by itself, at its own
    distance, for layers with a window that may end in the prefix.
    """

    start: int
    stop: int
    together: Segments
    each: Segments


@dataclass(frozen=True, slots=True)
class PrefixRows:
    """What the rows of a micro-batch attend of prefixes. reach: positions from the first row's prefix to the last row.

    counts: the fields of MicroBatchShape that begin with ``prefix``.
    """

    levels: tuple[PrefixLevel, ...]
    reach: int
    counts: dict[str, int]


def prefix_rows(rows: Sequence[tuple[int, int, int, Chain]]) -> PrefixRows | None:
    """rows: of each sequence of a micro-batch, in their order, (first row, rows, position of the first, prefixes)."""
    levels, reach = [], 0
    for depth in range(max((len(chain) for *_, chain in rows), default=0)):
        each: list[tuple[int, int, int, int, int]] = []
        together: list[list[int]] = []
        for first, count, position, chain in rows:
            if len(chain) <= depth:
                continue
            run = chain[depth]
            length = len(run.tokens)
            each.append((first, count, run.start, length, position - run.position))
            reach = max(reach, position + count)
            if together and together[-1][2] == run.start and sum(together[-1][:2]) == first:
                together[-1][1] += count
            else:
                together.append([first, count, run.start, length, length])
        start, stop = each[0][0], each[-1][0] + each[-1][1]
        levels.append(PrefixLevel(start, stop, _segments(together, start), _segments(each, start)))
    if not levels:
        return None
    tables = [level.together.table for level in levels]
    counts = {
        "prefix_rows": int(sum(table[1].sum() for table in tables)),
        "prefix_kv_tokens": int(sum(table[3].sum() for table in tables)),
        "prefix_pairs": int(sum((table[1] * table[3]).sum() for table in tables)),
    }
    return PrefixRows(tuple(levels), reach, counts)


def _segments(rows: Sequence[Sequence[int]], start: int) -> Segments:
    table = numpy.array(rows, dtype=numpy.int64).T
    return Segments(table[0] - start, *table[1:])
