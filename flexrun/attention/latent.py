"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): over a cache that keeps one latent for all heads.

A cached row is the normed latent of a token, and behind it the rotated key that all heads share. Two forms compute the
same; each segment takes the one with fewer FLOPs:

* absorbed, for few queries over many rows: the query comes to the latent's space (W_UK), attends the rows as they lie,
  all heads sharing one KV head, and the sum of latents leaves it (W_UV);
* expanded, for prompts: keys and values of each head are made of the latents, some heads at a time.

Either works in buffers of at most ``LATENT_BYTES`` each, so that memory does not grow with a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from flexrun.attention.host import attend
from flexrun.attention.segments import Segments

LATENT_BYTES = 16 << 20
# Absorbed: queries, sums, and each once more head by head. Expanded: gathered rows, product, keys and values (2.6 of
# them at the sizes of the published models).
LATENT_BUFFERS = 4


def attend_latent(
    query: Tensor, rows: Tensor, segments: Segments, kv_b: Tensor, *, scale: float, out: Tensor
) -> Tensor:
    """Causal attention of every segment over its own rows of a latent slab. Returns ``out``.

    query: [tokens, heads, nope + rope], its last rope channels rotated. rows: [capacity, 1, rank + rope].
    kv_b: [heads, nope + value, rank], contiguous: of each head what makes its keys of a latent, then its values.
    out: [tokens, heads, value]. One dtype and device.
    """
    _, num_heads, head_dim = query.shape
    rank, value_dim = kv_b.shape[2], out.shape[2]
    rope_dim = rows.shape[2] - rank
    if kv_b.shape != (num_heads, head_dim - rope_dim + value_dim, rank) or out.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"attend_latent: shapes disagree: query {tuple(query.shape)}, rows {tuple(rows.shape)}, "
            f"kv_b {tuple(kv_b.shape)}, out {tuple(out.shape)}"
        )
    absorbed, expanded = _forms(segments, head_dim, rope_dim, value_dim, rank, query.element_size())
    row_bytes = num_heads * rows.shape[2] * query.element_size()
    for part in _batches(absorbed, absorbed.query_len, max(LATENT_BYTES // row_bytes, 1)):
        _attend_absorbed(query, rows, part, kv_b, scale, out)
    token_bytes = (head_dim + value_dim) * query.element_size()
    for part in _batches(expanded, expanded.kv_len, LATENT_BYTES // token_bytes):
        _attend_expanded(query, rows, part, kv_b, scale, out)
    return out


def _forms(
    segments: Segments, head_dim: int, rope_dim: int, value_dim: int, rank: int, element_bytes: int
) -> tuple[Segments, Segments]:
    """(segments to attend absorbed, segments to attend expanded), remembered for the next layer."""
    known = segments.__dict__.setdefault("_latent_forms", {})
    key = (head_dim, rope_dim, value_dim, rank, element_bytes)
    if key not in known:
        query_len, kv_len = segments.query_len, segments.kv_len
        pairs = query_len * (kv_len - query_len) + query_len * (query_len + 1) // 2
        expansion = (head_dim - rope_dim + value_dim) * rank  # of one token and head
        absorbed = pairs * (2 * rank + rope_dim) + query_len * expansion
        expanded = pairs * 2 * head_dim + kv_len * expansion
        short = (
            (query_len == 1) | (absorbed <= expanded) | (kv_len * (head_dim + value_dim) * element_bytes > LATENT_BYTES)
        )
        known[key] = tuple(segments if mask.all() else Segments(*segments.table[:, mask]) for mask in (short, ~short))
    return known[key]


def _batches(segments: Segments, sizes: numpy.ndarray, limit: int) -> list[Segments]:
    """Runs of segments whose ``sizes`` sum to at most ``limit``, or of a single one; remembered for the next layer."""
    known = segments.__dict__.setdefault("_latent_batches", {})
    if limit not in known:
        cuts, total = [0], 0
        for index, size in enumerate(sizes.tolist()):
            if total and total + size > limit:
                cuts.append(index)
                total = 0
            total += size
        table, stops = segments.table, [*cuts[1:], len(segments)]
        whole = len(cuts) == 1
        known[limit] = [segments if whole else Segments(*table[:, start:stop]) for start, stop in zip(cuts, stops)]
    return known[limit] if len(segments) else []


def _attend_absorbed(query, rows, segments: Segments, kv_b, scale, out) -> None:
    num_heads, nope_dim, rank = query.shape[1], kv_b.shape[1] - out.shape[2], kv_b.shape[2]
    block_rows = max(LATENT_BYTES // (num_heads * rows.shape[2] * query.element_size()), 1)
    for part in _query_blocks(segments, block_rows):
        local = _local(part, query.device)
        chosen = query[local.query]
        inner = query.new_empty(len(chosen), num_heads, rows.shape[2])
        _by_head(chosen[..., :nope_dim], kv_b[:, :nope_dim], inner[..., :rank])
        inner[..., rank:] = chosen[..., nope_dim:]
        sums = torch.empty_like(inner)
        attend(inner, rows, rows, local.over_slab, scale=scale, out=sums)
        result = chosen.new_empty(*chosen.shape[:2], out.shape[2])
        _by_head(sums[..., :rank], kv_b[:, nope_dim:].transpose(1, 2), result)
        out[local.query] = result


def _by_head(rows: Tensor, matrices: Tensor, out: Tensor) -> None:
    """out [tokens, heads, M] = rows [tokens, heads, K] times matrices [heads, K, M], which may be views.

    A batched product on the CPU would first copy such views; a GPU must not be sent a product a head.
    """
    if rows.is_cuda:
        out.copy_(torch.bmm(rows.transpose(0, 1), matrices).transpose(0, 1))
        return
    for head, matrix in enumerate(matrices.unbind()):
        out[:, head] = torch.mm(rows[:, head], matrix)


def _attend_expanded(query, rows, segments: Segments, kv_b, scale, out) -> None:
    """A row of a head is its value, then its key: the key's width of it is read as value too, and the rest dropped."""
    num_heads, head_dim, value_dim = query.shape[1], query.shape[2], out.shape[2]
    nope_dim, rank = kv_b.shape[1] - value_dim, kv_b.shape[2]
    local = _local(segments, query.device)
    own = rows[local.kv, 0]
    latents, keys = own[:, :rank], own[:, None, rank:]
    count, width = len(own), value_dim + head_dim
    step = min(max(LATENT_BYTES // (count * width * query.element_size()), 1), num_heads)
    buffer = query.new_empty(count, step, width)
    for first in range(0, num_heads, step):
        heads = slice(first, min(first + step, num_heads))
        part = buffer[:, : heads.stop - first]
        both = torch.mm(latents, kv_b[heads].view(-1, rank).t()).view(*part.shape[:2], nope_dim + value_dim)
        part[..., :value_dim] = both[..., nope_dim:]
        part[..., value_dim : value_dim + nope_dim] = both[..., :nope_dim]
        part[..., value_dim + nope_dim :] = keys
        chosen = query[:, heads][local.query]
        result = torch.empty(chosen.shape, dtype=query.dtype, device=query.device)
        attend(chosen, part[..., value_dim:], part[..., :head_dim], local.over_own, scale=scale, out=result)
        out[:, heads][local.query] = result[..., :value_dim]


@dataclass(frozen=True)
class _Local:
    """Query rows and KV rows of some segments, laid together.

    query, kv: slices, or int64 row numbers where they lie apart. over_slab: the segments with query rows counted among
    ``query``; over_own: with KV rows counted among ``kv`` as well.
    """

    query: slice | Tensor
    kv: slice | Tensor
    over_slab: Segments
    over_own: Segments


def _local(segments: Segments, device: torch.device) -> _Local:
    """Remembered for the next layer."""
    known = segments.__dict__.setdefault("_latent_local", {})
    if device not in known:
        starts = [numpy.cumsum(lengths) - lengths for lengths in (segments.query_len, segments.kv_len)]
        known[device] = _Local(
            _rows(segments.query_start, segments.query_len, device),
            _rows(segments.kv_start, segments.kv_len, device),
            Segments(starts[0], segments.query_len, segments.kv_start, segments.kv_len),
            Segments(starts[0], segments.query_len, starts[1], segments.kv_len),
        )
    return known[device]


def _rows(starts: numpy.ndarray, lengths: numpy.ndarray, device: torch.device) -> slice | Tensor:
    if (starts[1:] == (starts + lengths)[:-1]).all():
        return slice(int(starts[0]), int(starts[-1] + lengths[-1]))
    return torch.from_numpy(numpy.concatenate([numpy.arange(*ends) for ends in zip(starts, starts + lengths)])).to(
        device
    )


def _query_blocks(segments: Segments, rows: int) -> list[Segments]:
    """The segments, or the blocks of at most ``rows`` query rows of a single long one."""
    (first, *_), count = segments.rows[0], len(segments)
    query_len, kv_start, kv_len = segments.rows[0][1:]
    if count > 1 or query_len <= rows:
        return [segments]
    known = segments.__dict__.setdefault("_latent_blocks", {})
    if rows not in known:
        starts = range(0, query_len, rows)
        lengths = [min(rows, query_len - start) for start in starts]
        known[rows] = [
            Segments([first + start], [length], [kv_start], [kv_len - query_len + start + length])
            for start, length in zip(starts, lengths)
        ]
    return known[rows]
