"""A KV cache in 8 or 4 bits: new rows go in, complete groups are compressed, and queries attend what decoding sees.

A query sees tokens of its own group of 64 in the model's dtype, and all tokens before as they come back from the cache:
whether it is of a prompt or decoded, and however passes were cut. So a group is compressed when its last token is in,
and the tokens of the group at hand wait, row by row, among the ``recent`` ones of their sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from flexrun import native
from flexrun.attention import Segments, attend, merge
from flexrun.compress import GROUP_TOKENS, KVFormat, dequantise_kv, quantise_kv
from flexrun.errors import ExecutionError
from flexrun.models.spec import AttentionForm
from flexrun.placement import DENSE_TOKENS

CPU = torch.device("cpu")


@dataclass(frozen=True)
class CodedSlab:
    """What one layer has of a micro-batch. records: uint8 [groups, record_bytes] of its room. recent: [2, places, 64,
    heads, head_dim], the newest keys and values of each sequence. One device."""

    form: KVFormat
    records: Tensor
    recent: Tensor


@dataclass(frozen=True)
class _Old:
    """Queries over records brought back together. chosen: int64, records; segments: over their tokens; rows: first and
    last query row of these, and one past it."""

    chosen: Tensor
    segments: Segments
    rows: slice


@dataclass(frozen=True)
class CodedRows:
    """Where the rows of one micro-batch go and what they attend; the same for every layer of a pass.

    early, late: (rows, places, offsets), int64: rows that go among the recent ones, before and after attention: a chunk
    of a prompt may end a group and begin another. whole_recent, whole_new: places and first rows of groups that these
    complete, out of the recent ones of a place or of 64 new rows. completed: their records, in this order. own_recent,
    own_new: queries over their own group, among the recent rows of all places or among the new ones; None where there
    are none.
    decoding: int64 [5, sequences] of those of one row: query row, first record, records, first recent row, recent rows;
    kernels attend them in one call. Without kernels they are among the others, and this is None.
    """

    early: tuple[Tensor, Tensor, Tensor]
    late: tuple[Tensor, Tensor, Tensor]
    whole_recent: Tensor
    whole_new: Tensor
    completed: Tensor
    own_recent: Segments | None
    own_new: Segments | None
    old: list[_Old]
    decoding: numpy.ndarray | None


def reads_codes(form: KVFormat) -> bool:
    """Whether kernels attend records as they are, on the CPU, for queries that decode."""
    return native.available and form.head_dim == form.width


def coded_rows(segments: Segments, places: numpy.ndarray, direct: bool, device: torch.device = CPU) -> CodedRows:
    """Tables of whole sequences: query rows from 0, KV rows of the slab's tokens, whole groups to begin with.

    places: int64 [segments], of each sequence among the recent rows. direct: see reads_codes. device: of the slab.
    """
    decoding, early, late, whole_recent, whole_new, own_recent, own_new = [], [], [], [], [], [], []
    pieces = []  # query_start, query_len, first record, groups before, position
    for (row, count, kv_start, kv_len), place in zip(segments.rows, places.tolist()):
        position, record = kv_len - count, kv_start // GROUP_TOKENS
        end = row + count
        while row < end:
            group, offset = divmod(position, GROUP_TOKENS)
            length = min(GROUP_TOKENS - offset, end - row)
            whole = offset + length == GROUP_TOKENS
            if offset or count == 1:
                early.append((row, length, place, offset))
                newest = place * GROUP_TOKENS, offset + length
                if direct and count == 1:
                    decoding.append((row, record, group, *newest))
                else:
                    own_recent.append((row, length, *newest))
                if whole:
                    whole_recent.append((place, record + group))
            else:
                own_new.append((row, length, row, length))
                if whole:
                    whole_new.append((row, record + group))
                else:
                    late.append((row, length, place, 0))
            if group and not (direct and count == 1):
                pieces.append((row, length, record, group, position))
            row, position = row + length, position + length
    completed = numpy.array(whole_recent + whole_new, dtype=numpy.int64).reshape(-1, 2)
    sources, records = (torch.from_numpy(column.copy()) for column in completed.T)
    return CodedRows(
        *(tuple(each.to(device) for each in _moved(table)) for table in (early, late)),
        *(table.to(device) for table in (*sources.split((len(whole_recent), len(whole_new))), records)),
        _segments(own_recent),
        _segments(own_new),
        _old(pieces, device),
        numpy.ascontiguousarray(numpy.array(decoding, dtype=numpy.int64).T) if decoding else None,
    )


def _moved(runs: list[tuple[int, int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, places, offsets) of runs (row, length, place, offset)."""
    table = numpy.array(runs, dtype=numpy.int64).reshape(-1, 4)
    lengths = table[:, 1]
    steps = numpy.arange(lengths.sum()) - numpy.repeat(numpy.cumsum(lengths) - lengths, lengths)
    rows, places, offsets = (numpy.repeat(table[:, column], lengths) for column in (0, 2, 3))
    return torch.from_numpy(rows + steps), torch.from_numpy(places), torch.from_numpy(offsets + steps)


def _segments(rows: list[tuple[int, int, int, int]]) -> Segments | None:
    return Segments(*numpy.array(rows, dtype=numpy.int64).T) if rows else None


def _old(pieces: list[tuple[int, int, int, int, int]], device: torch.device) -> list[_Old]:
    """Batches of at most DENSE_TOKENS tokens that are brought back; a longer sequence is in several."""
    most, found = DENSE_TOKENS // GROUP_TOKENS, []
    chosen: list[int] = []
    rows: list[tuple[int, int, int, int, int]] = []
    by_sequence: dict[int, list[tuple[int, int, int, int]]] = {}
    for row, length, record, groups, position in pieces:
        by_sequence.setdefault(record, []).append((row, length, groups, position))

    def finish() -> None:
        first, last = min(row for row, *_ in rows), max(row + length for row, length, *_ in rows)
        shifted = numpy.array(rows, dtype=numpy.int64).T
        shifted[0] -= first
        found.append(_Old(torch.tensor(chosen, device=device), Segments(*shifted), slice(first, last)))
        chosen.clear()
        rows.clear()

    for record, own in by_sequence.items():
        groups = max(groups for _, _, groups, _ in own)
        for start in range(0, groups, most):
            count = min(most, groups - start)
            if chosen and len(chosen) + count > most:
                finish()
            base = len(chosen) * GROUP_TOKENS
            chosen.extend(range(record + start, record + start + count))
            for row, length, seen, position in own:
                if seen > start:
                    tokens = min(seen - start, count) * GROUP_TOKENS
                    rows.append((row, length, base, tokens, position - start * GROUP_TOKENS))
    if rows:
        finish()
    return found


def store_coded(slab: CodedSlab, rows: CodedRows, new: list[Tensor], name: str) -> None:
    """Take in new keys and values [rows, heads, head_dim], apart from those that wait until what was there is attended.

    name: of the slab, where what comes in cannot be compressed.
    """
    shape = len(rows.completed), slab.form.record_bytes
    made = torch.empty(shape, dtype=torch.uint8, device=slab.records.device)
    complete(slab.form, slab.recent, rows, new, made, name)
    put_groups(slab, rows, made)


def complete(
    form: KVFormat, recent: Tensor | None, rows: CodedRows, new: list[Tensor], made: Tensor, name: str
) -> None:
    """The same into ``recent``, see CodedSlab, and into ``made``, uint8 [groups, record_bytes]: those of ``completed``.
    recent may be None where neither ``early`` nor ``whole_recent`` has anything."""
    _keep(recent, rows.early, new)
    most, count = DENSE_TOKENS // GROUP_TOKENS, len(rows.whole_recent)
    for start in range(0, count, most):
        part = slice(start, min(start + most, count))
        quantise_kv(*recent.index_select(1, rows.whole_recent[part]), form, made[part], name)
    for start in range(0, len(rows.whole_new), most):
        first = rows.whole_new[start : start + most]
        chosen = (first[:, None] + torch.arange(GROUP_TOKENS, device=first.device)).flatten()
        planes = (plane.index_select(0, chosen).unflatten(0, (-1, GROUP_TOKENS)) for plane in new)
        quantise_kv(*planes, form, made[count + start : count + start + len(first)], name)


def put_groups(slab: CodedSlab, rows: CodedRows, made: Tensor) -> None:
    """What ``complete`` has made, to its records."""
    if len(made):
        slab.records.index_copy_(0, rows.completed, made)


def store_late(slab: CodedSlab, rows: CodedRows, new: list[Tensor]) -> None:
    """Take in the rest: once the queries of the pass have attended."""
    _keep(slab.recent, rows.late, new)


def _keep(recent: Tensor | None, moved: tuple[Tensor, Tensor, Tensor], new: list[Tensor]) -> None:
    rows, places, offsets = moved
    if len(rows):
        for plane, values in enumerate(new):
            recent[plane, places, offsets] = values.index_select(0, rows)


def attend_coded(
    query: Tensor,
    slab: CodedSlab,
    rows: CodedRows,
    new: list[Tensor],
    form: AttentionForm,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None = None,
) -> None:
    """Attention of the rows of a micro-batch, after ``store_coded`` and before ``store_late``.

    query, out: [rows, num_heads, head_dim]; new: keys and values of the same rows; sinks, lse: see flexrun.attention.
    """
    options = {"scale": form.scale, "window": form.window, "softcap": form.softcap}
    if lse is None and rows.old:
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if rows.own_recent is not None:
        attend(query, *slab.recent.flatten(1, 2), rows.own_recent, **options, sinks=sinks, out=out, lse=lse)
    if rows.own_new is not None:
        attend(query, *new, rows.own_new, **options, sinks=sinks, out=out, lse=lse)
    for old in rows.old:
        keys, values = dequantise_kv(slab.records.index_select(0, old.chosen), slab.form, query.dtype)
        part = query[old.rows]
        there = torch.zeros_like(part)
        lse_there = torch.full(part.shape[:2], float("-inf"), device=query.device)
        attend(part, keys, values, old.segments, **options, out=there, lse=lse_there)
        target, lse_here = out[old.rows], lse[old.rows]
        merge(target, lse_here, there, lse_there, target, lse_here)
    if rows.decoding is not None:
        table, options["sinks"] = rows.decoding, sinks
        recent = slab.recent.flatten(1, 2)
        if not native.attend_coded(
            query, slab.records, recent, slab.form, table.ctypes.data, table.shape[1], options, out, lse
        ):
            raise ExecutionError("attention over compressed KV finds no memory", "lower --max-num-seqs")


def take_in_and_attend(
    query: Tensor,
    slab: CodedSlab,
    rows: CodedRows,
    new: list[Tensor],
    form: AttentionForm,
    sinks: Tensor | None,
    out: Tensor,
    name: str,
    lse: Tensor | None = None,
) -> None:
    """All that is to do with the rows of a micro-batch; see store_coded and attend_coded."""
    store_coded(slab, rows, new, name)
    attend_coded(query, slab, rows, new, form, sinks, out, lse)
    store_late(slab, rows, new)


@dataclass(frozen=True)
class SharedRows:
    """Rows of prefixes that sequences share, in a slab of the model's dtype that has complete groups as they come back.

    kv_rows: int64, of each row; own, old: queries over their own group, and over all before, old is None where there is
    nothing; whole: int64, all rows of the groups that these complete. All but queries are rows of the slab.
    """

    kv_rows: Tensor
    own: Segments
    old: Segments | None
    whole: Tensor


def shared_rows(segments: Segments, kv_rows: Tensor, device: torch.device) -> SharedRows:
    own, old, whole = [], [], []
    for row, count, kv_start, kv_len in segments.rows:
        position, end = kv_len - count, row + count
        while row < end:
            group, offset = divmod(position, GROUP_TOKENS)
            length, first = min(GROUP_TOKENS - offset, end - row), kv_start + group * GROUP_TOKENS
            own.append((row, length, first, offset + length))
            if group:
                old.append((row, length, kv_start, group * GROUP_TOKENS, position))
            if offset + length == GROUP_TOKENS:
                whole.append(first)
            row, position = row + length, position + length
    starts = torch.tensor(whole, dtype=torch.int64)
    rows = (starts[:, None] + torch.arange(GROUP_TOKENS)).flatten()
    return SharedRows(kv_rows.to(device), _segments(own), _segments(old), rows.to(device))


def attend_shared(
    query: Tensor,
    slab: Tensor,
    rows: SharedRows,
    new: list[Tensor],
    format: KVFormat,
    form: AttentionForm,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    found: tuple[Tensor, Tensor],
    name: str,
) -> None:
    """Take in rows of prefixes, and attend what these have so far. slab: [2, tokens, heads, head_dim]. found: where to
    work, like out and lse."""
    options = {"scale": form.scale, "window": form.window, "softcap": form.softcap}
    for plane, values in zip(slab, new):
        plane.index_copy_(0, rows.kv_rows, values)
    attend(query, *slab, rows.own, **options, sinks=sinks, out=out, lse=lse)
    for start in range(0, len(rows.whole), DENSE_TOKENS):
        part = rows.whole[start : start + DENSE_TOKENS]
        made = torch.empty(len(part) // GROUP_TOKENS, format.record_bytes, dtype=torch.uint8, device=slab.device)
        quantise_kv(*slab.index_select(1, part).unflatten(1, (-1, GROUP_TOKENS)), format, made, name)
        slab.index_copy_(1, part, dequantise_kv(made, format, slab.dtype))
    if rows.old is not None:
        there, lse_there = found[0].zero_(), found[1].fill_(float("-inf"))
        attend(query, *slab, rows.old, **options, out=there, lse=lse_there)
        merge(out, lse, there, lse_there, out, lse)


def slab_name(layer: int) -> str:
    """What users are told that cannot be compressed."""
    return f"KV cache of layer {layer}"
