"""Which rows of a pass, and which KV of its sequences, are on which side of a border between host and device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from flexrun.attention import Segments
from flexrun.placement import KVMicroBatch
from flexrun.steps import pairs_of


@dataclass(frozen=True, slots=True)
class SplitRows:
    """Rows of one micro-batch whose KV is split by token: its sequences' oldest on the host, the rest on the device.

    kv_rows: int64 [rows], row of each in the slab of its side. below_rows, above_rows: int64, the rows of either side,
    counted from the micro-batch's first. below, above: segments of the rows that are not fresh over the slab of either
    side, None where nothing is there at all.
    counts: the fields of MicroBatchShape that begin with ``above``.
    """

    kv_rows: numpy.ndarray
    below_rows: numpy.ndarray
    above_rows: numpy.ndarray
    below: Segments | None
    above: Segments | None
    counts: dict[str, int]


def split_rows(
    place: KVMicroBatch,
    segments: Segments,
    starts: numpy.ndarray,
    capacities: numpy.ndarray,
    positions: numpy.ndarray,
    fresh: numpy.ndarray,
) -> SplitRows:
    """segments: of whole sequences, query rows from 0 without gaps. starts, capacities: int64, the run of its
    micro-batch's room that each has. positions: int64 [rows], of each row in its sequence. fresh: bool, see Batcher."""
    host_start, device_start, border = place.split(starts, capacities)
    border_of, host_of, device_of = (
        numpy.repeat(values, segments.query_len) for values in (border, host_start, device_start - border)
    )
    above_border = positions >= border_of
    whole = Segments(segments.query_start, segments.query_len, host_start, segments.kv_len)
    below, above = (Segments(*part.table[:, ~fresh]) for part in whole.split_kv(border, device_start))
    single = (above.query_len == 1) & (above.kv_len > 0)
    return SplitRows(
        positions + numpy.where(above_border, device_of, host_of),
        numpy.flatnonzero(~above_border),
        numpy.flatnonzero(above_border),
        below if below.kv_len.any() else None,
        above if above.kv_len.any() else None,
        {
            "above_new_tokens": int(above_border.sum()),
            "above_kv_tokens": int(above.kv_len.sum()),
            "above_pairs": int(pairs_of(above.query_len, above.kv_len).sum()),
            "above_decode_tokens": int(single.sum()),
            "above_decode_kv_tokens": int(above.kv_len[single].sum()),
        },
    )
