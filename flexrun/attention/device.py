"""Attention on a GPU: ragged segments in as few kernel launches as there are, without padding where a kernel allows.

bfloat16 and float16 go through torch's variable-length flash attention: it reads K and V where they lie in the slab,
each sequence from its own first row to its own length, and shares KV heads among query heads. Where that kernel does
not apply (float32, soft caps, old GPUs), decoding sequences of like lengths are gathered into one padded batch, and
prompts are attended one by one.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexrun.attention.sdpa import attend_segment, sink_share
from flexrun.attention.segments import Segments

LIKE_LENGTHS = 1.25  # longest sequence of a padded group, in lengths of its shortest
GATHER_ELEMENTS = 1 << 24  # most elements of the keys (and of the values) of one group: 64 MiB of float32
FLASH_HEAD_DIM = 256

Upload = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class _Packed:
    """Segments whose query rows follow each other. starts: int32 [segments + 1] each, on the device."""

    rows: slice
    query_starts: Tensor
    kv_starts: Tensor
    kv_lengths: Tensor  # int32 [segments]
    longest_query: int
    longest_kv: int


@dataclass(frozen=True)
class _Tables:
    """What the kernels of one Segments need on the device; the same for every layer of a pass.

    packed: None where the segments do not lie as the flash kernel wants them. decode: int64 [3, sequences]: query row,
    first KV row and length of the sequences of one query row, shortest first; decode_lengths: the lengths on the host.
    others: the segments of several query rows. unseeing: int64 rows, of either kind, of segments without KV; None where
    there are none.
    """

    packed: tuple[_Packed, ...] | None
    decode: Tensor
    decode_lengths: list[int]
    others: list[tuple[int, int, int, int]]
    unseeing: Tensor | None


def prepare(segments: Segments, upload: Upload) -> None:
    """Put the tables of ``segments`` on the device, once a pass. upload(name, values) returns values on the device."""
    segments.__dict__["_device_tables"] = _tables(segments, upload)


def _tables(segments: Segments, upload: Upload) -> _Tables:
    single, empty = segments.query_len == 1, segments.kv_len == 0
    order = numpy.flatnonzero(single & ~empty)
    order = order[numpy.argsort(segments.kv_len[order], kind="stable")]
    columns = (segments.query_start, segments.kv_start, segments.kv_len)
    decode = numpy.stack([column[order] for column in columns])
    others = [row for row, left_out in zip(segments.rows, (single | empty).tolist()) if not left_out]
    unseeing = [numpy.arange(row, row + count) for row, count, *_ in segments.table[:, empty].T.tolist()]
    return _Tables(
        _packed(segments, single, upload),
        upload("decode", torch.from_numpy(decode)),
        decode[2].tolist(),
        others,
        upload("unseeing", torch.from_numpy(numpy.concatenate(unseeing))) if unseeing else None,
    )


def _packed(segments: Segments, single: numpy.ndarray, upload: Upload) -> tuple[_Packed, ...] | None:
    """One call for the decoding sequences and one for the others where each lie together, else one for all."""
    choices = ([single, ~single], [numpy.ones_like(single)])
    for masks in choices:
        parts = [(segments.query_start[mask], mask) for mask in masks if mask.any()]
        if all((starts[1:] == (starts + segments.query_len[mask])[:-1]).all() for starts, mask in parts):
            return tuple(_pack(segments, mask, number, upload) for number, (_, mask) in enumerate(parts))
    return None


def _pack(segments: Segments, mask: numpy.ndarray, number: int, upload: Upload) -> _Packed:
    query_start, query_len = segments.query_start[mask], segments.query_len[mask]
    kv_start, kv_len = segments.kv_start[mask], segments.kv_len[mask]
    first, last = int(query_start[0]), int(query_start[-1] + query_len[-1])
    table = numpy.zeros((3, len(query_start) + 1), dtype=numpy.int32)
    table[0, :-1], table[0, -1] = query_start - first, last - first
    table[1, :-1], table[1, -1] = kv_start, kv_start[-1] + kv_len[-1]
    table[2, :-1] = kv_len
    starts, kv_starts, lengths = upload(f"packed {number}", torch.from_numpy(table))
    return _Packed(slice(first, last), starts, kv_starts, lengths[:-1], int(query_len.max()), int(kv_len.max()))


def attend_on_device(
    query, keys, values, segments: Segments, scale: float, window: int, softcap: float, sinks, out, lse=None
) -> bool:
    """See ``attend``; the tensors are checked. False, with nothing done, for segments over the first part of sequences,
    unless all their rows see all of it.

    Rows in front of a last part (it begins behind them) see nothing of it, as the kernels' causal masks end in the last
    row and column.
    """
    if not len(segments):
        return False
    whole = False
    if (segments.query_position != segments.kv_len - segments.query_len).any():
        whole = not window and bool((segments.query_position >= segments.kv_len - 1).all())
        if not whole:
            return False
    if "_device_tables" not in segments.__dict__:
        prepare(segments, lambda name, values: values.to(query.device, non_blocking=True))
    tables: _Tables = segments.__dict__["_device_tables"]
    if tables.packed is not None and not softcap and _flash_applies(query):
        for part in tables.packed:
            _attend_packed(query, keys, values, part, scale, window, whole, sinks, out, lse)
        return True
    if tables.unseeing is not None:
        out.index_fill_(0, tables.unseeing, 0.0)
        if lse is not None:
            lse[tables.unseeing] = float("-inf") if sinks is None else sinks
    _attend_decoding(query, keys, values, tables, scale, window, softcap, sinks, out, lse)
    for query_start, query_len, kv_start, kv_len in tables.others:
        rows, kv_rows = slice(query_start, query_start + query_len), slice(kv_start, kv_start + kv_len)
        attend_segment(
            query[rows],
            keys[kv_rows],
            values[kv_rows],
            query_position=kv_len if whole else kv_len - query_len,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            out=out[rows],
            lse=None if lse is None else lse[rows],
        )
    return True


def _flash_applies(query: Tensor) -> bool:
    head_dim = query.shape[2]
    fits = query.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= FLASH_HEAD_DIM
    return fits and query.is_cuda and _has_flash(query.device)


@lru_cache
def _has_flash(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        parameters = inspect.signature(_varlen().varlen_attn_out).parameters
    except (ImportError, AttributeError):
        return False
    return {"seqused_k", "enable_gqa", "window_size", "scale", "return_aux"} <= set(parameters)


@lru_cache
def _varlen() -> ModuleType:
    """Imported where a GPU uses it: it brings torch's compiler along, a second that nobody else should wait."""
    return importlib.import_module("torch.nn.attention.varlen")


def _attend_packed(query, keys, values, part: _Packed, scale, window, whole: bool, sinks, out, lse) -> None:
    """window counts the row itself, the kernel's left border does not. whole: every row sees all KV of its segment."""
    varlen = _varlen()
    result = varlen.varlen_attn_out(
        out[part.rows],
        query[part.rows],
        keys,
        values,
        part.query_starts,
        part.kv_starts,
        part.longest_query,
        part.longest_kv,
        scale=scale,
        window_size=(window - 1 if window else -1, -1 if whole else 0),
        enable_gqa=query.shape[1] != keys.shape[1],
        seqused_k=part.kv_lengths,
        return_aux=None if sinks is None and lse is None else varlen.AuxRequest(lse=True),
    )
    if sinks is None and lse is None:
        return
    total = result[1].t()  # it is [heads, rows], and infinite for rows that see nothing
    total = total.masked_fill(total.isinf(), float("-inf"))
    if sinks is not None:  # the kernel knows none
        out[part.rows].mul_(sink_share(total, sinks))
        total = torch.logaddexp(total, sinks)
    if lse is not None:
        lse[part.rows] = total


def like_lengths(lengths: list[int], row_elements: int) -> list[slice]:
    """Groups of sequences whose ascending ``lengths`` differ little, and whose padded batch is not too large."""
    groups, start = [], 0
    for place, length in enumerate(lengths):
        too_long = length > LIKE_LENGTHS * lengths[start]
        if place > start and (too_long or (place - start + 1) * length * row_elements > GATHER_ELEMENTS):
            groups.append(slice(start, place))
            start = place
    return [*groups, slice(start, len(lengths))] if lengths else []


def _attend_decoding(query, keys, values, tables: _Tables, scale, window, softcap, sinks, out, lse) -> None:
    """Sequences of one query row each, gathered group by group; the group of query heads stands for positions."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = keys.shape[1]
    for group in like_lengths(tables.decode_lengths, num_kv_heads * head_dim):
        rows, starts, lengths = tables.decode[:, group]
        count, longest = len(rows), tables.decode_lengths[group.stop - 1]
        position = torch.arange(longest, device=query.device)
        kv_rows = (starts[:, None] + torch.minimum(position, lengths[:, None] - 1)).flatten()
        visible = position < lengths[:, None]
        if window:
            visible &= position >= lengths[:, None] - window
        batch = (count, longest, num_kv_heads, head_dim)
        key, value = (slab.index_select(0, kv_rows).view(batch).transpose(1, 2) for slab in (keys, values))
        grouped = query.index_select(0, rows).view(count, num_kv_heads, num_heads // num_kv_heads, head_dim)
        mask = visible[:, None, None]
        if softcap or sinks is not None or lse is not None:
            scores = (grouped.float() @ key.float().transpose(-1, -2)).mul_(scale)
            if softcap:
                scores.div_(softcap).tanh_().mul_(softcap)
            scores.masked_fill_(~mask, float("-inf"))
            result = scores.softmax(-1) @ value.float()
            total = scores.logsumexp(-1)
            if sinks is not None:
                by_head = sinks.view(num_kv_heads, -1)
                result *= sink_share(total, by_head)
                total = torch.logaddexp(total, by_head)
            if lse is not None:
                lse.index_copy_(0, rows, total.flatten(1))
            result = result.to(query.dtype)
        else:
            result = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        out.index_copy_(0, rows, result.reshape(count, num_heads, head_dim))
