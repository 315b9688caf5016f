"""A compressed KV cache beside a device whose memory it is not in: what a pass makes of it there, and what goes home.

The device compresses every group that its rows complete, as soon as keys and values are made, into a buffer of new
records: prompts that start in the pass attend them there, queries over KV that comes to a staging slot have them put
beside what came, and a copy lane carries them home. Where the host attends, rows that belong to what is cached go down
as they are and are taken in there; only what starts in the pass comes compressed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from flexrun.attention import Segments
from flexrun.compress import GROUP_TOKENS
from flexrun.models.spec import AttentionForm
from flexrun.offload.batcher import MicroBatchRows
from flexrun.offload.coded_kv import (
    CPU,
    CodedRows,
    CodedSlab,
    attend_coded,
    coded_rows,
    complete,
    put_groups,
    store_late,
)


@dataclass(frozen=True)
class AwayRows:
    """The rows of one micro-batch; the same for every layer of a pass. None: there are no such rows.

    cached: rows over what earlier passes left, for the slab where they are attended: on the host, or in a staging slot.
    fresh: those of prompts that start, for a slab of the records they make. made_cached, made_fresh: where among the
    new records what either completes is. homes: (first new record, first record of the slab at home, count).
    late: (row of the pass, place, rows): of prompts that start, what the host keeps of them row by row.
    """

    cached: CodedRows | None
    fresh: CodedRows | None
    on_host: bool
    made_cached: slice
    made_fresh: slice
    homes: list[tuple[int, int, int]]
    late: list[tuple[int, int, int]]


def away_rows(
    rows: MicroBatchRows, places: numpy.ndarray, first: int, on_host: bool, direct: bool, device: torch.device
) -> AwayRows:
    """places: int64, of each sequence among the recent rows. first: record among the new ones, from which on those of
    this micro-batch are. on_host: the host attends what is cached. direct: whether kernels of who attends it read codes
    (see reads_codes). device: of the new records."""
    segments, cached, fresh = rows.segments, None, None
    starts = (segments.query_len == segments.kv_len) & (segments.query_len > 1)
    home = numpy.zeros(0, dtype=numpy.int64)  # records of the slab that are completed on the device, in their order
    late = []
    if rows.cached is not None:
        cached = coded_rows(rows.cached, places[~starts], direct, CPU if on_host else device)
        if not on_host:
            home = cached.completed.cpu().numpy()
    middle = first + len(home)
    if rows.fresh is not None:
        tokens = segments.query_len[starts]
        groups = tokens // GROUP_TOKENS
        before = numpy.cumsum(groups) - groups
        own = Segments(rows.fresh.query_start, tokens, before * GROUP_TOKENS, tokens)
        fresh = coded_rows(own, places[starts], False, device)
        records = numpy.repeat(segments.kv_start[starts] // GROUP_TOKENS - before, groups)
        home = numpy.concatenate([home, records + numpy.arange(len(records))])
        if on_host:
            kept = tokens - groups * GROUP_TOKENS
            ends = rows.fresh_start + rows.fresh.query_start + tokens
            late = [run for run in zip((ends - kept).tolist(), places[starts].tolist(), kept.tolist()) if run[2]]
    return AwayRows(
        cached, fresh, on_host, slice(first, middle), slice(middle, first + len(home)), _runs(first, home), late
    )


def _runs(first: int, home: numpy.ndarray) -> list[tuple[int, int, int]]:
    """Neighbours that stay neighbours, together."""
    begins = numpy.flatnonzero(numpy.diff(home, prepend=-2) != 1)
    counts = numpy.diff(begins, append=len(home))
    return list(zip((first + begins).tolist(), home[begins].tolist(), counts.tolist()))


def complete_away(away: AwayRows, slab: CodedSlab, cached: list[Tensor], fresh: list[Tensor], name: str) -> None:
    """Compress the groups that new keys and values complete, before anything attends them. slab: of new records, with
    the recent rows of the micro-batch; cached, fresh: the planes of these rows; name: see store_coded."""
    if away.cached is not None and not away.on_host:
        complete(slab.form, slab.recent, away.cached, cached, slab.records[away.made_cached], name)
    if away.fresh is not None:
        complete(slab.form, None, away.fresh, fresh, slab.records[away.made_fresh], name)


def attend_staged(
    query: Tensor,
    away: AwayRows,
    made: CodedSlab,
    slab: CodedSlab,
    new: list[Tensor],
    form: AttentionForm,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None = None,
) -> None:
    """Attention of the cached rows, over the staging slot ``slab``; made: new records. See attend_coded."""
    put_groups(slab, away.cached, made.records[away.made_cached])
    attend_coded(query, slab, away.cached, new, form, sinks, out, lse)
    store_late(slab, away.cached, new)


def attend_fresh(
    query: Tensor,
    away: AwayRows,
    made: CodedSlab,
    new: list[Tensor],
    form: AttentionForm,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None = None,
) -> None:
    """The same of prompts that start."""
    slab = CodedSlab(made.form, made.records[away.made_fresh], made.recent)
    attend_coded(query, slab, away.fresh, new, form, sinks, out, lse)
    if not away.on_host:
        store_late(slab, away.fresh, new)
