"""The one attention call of the decoder: checks the tensors, then picks the fastest way for each segment."""

from __future__ import annotations

import torch

from flexrun import native
from flexrun.attention.device import attend_on_device
from flexrun.attention.sdpa import attend_segment
from flexrun.attention.segments import Segments

NATIVE_QUERY_TOKENS = 8  # segments of at most so many query rows are bound by reading KV, the native kernel's strength


def attend(
    query,
    keys,
    values,
    segments: Segments,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks=None,
    out,
    lse=None,
):
    """Causal attention of every segment, each over its own rows of a KV slab. Returns ``out``.

    query: [tokens, num_heads, D]. keys, values: [capacity, num_kv_heads, D], token-major slabs that may be strided
    views (last dim contiguous); ``num_kv_heads`` divides ``num_heads``. out: [tokens, num_heads, D], rows of no
    segment are left as they are. One dtype: float32, bfloat16 or float16; softmax and sums are float32.
    lse: None, or float32 [tokens, num_heads] (last dim contiguous) that gets the natural logarithm of each row's sum
    of ``exp(score)``, -inf where the row sees nothing; ``merge`` joins partial results by it.
    sinks: None, or contiguous float32 [num_heads] on the query's device: one more score of each row of a head, taken
    as it is, that has its share of the softmax (and of lse) and no value. A row that sees nothing still becomes zeros.
    scale multiplies ``q·k``; softcap ``c`` > 0 replaces a score ``s`` with ``c * tanh(s / c)``; window 0 is unlimited.
    Raises ValueError where shapes or dtypes disagree or a segment lies outside the tensors.
    """
    _check(query, keys, values, segments, out, lse, sinks)
    if query.is_cuda:
        if not attend_on_device(query, keys, values, segments, scale, window, softcap, sinks, out, lse):
            _attend_each(query, keys, values, segments, scale, window, softcap, sinks, out, lse)
        return out
    if not native.available:
        _attend_each(query, keys, values, segments, scale, window, softcap, sinks, out, lse)
        return out
    short, long = segments.split(NATIVE_QUERY_TOKENS)
    for part in (short, long):
        if len(part) and not native.attend(
            query, keys, values, out, part.pointer, len(part), scale, window, softcap, part is long, lse, sinks
        ):
            _attend_each(query, keys, values, part, scale, window, softcap, sinks, out, lse)
    return out


def _attend_each(query, keys, values, segments, scale, window, softcap, sinks, out, lse) -> None:
    for (query_start, query_len, kv_start, kv_len), position in zip(segments.rows, segments.query_position.tolist()):
        rows, kv_rows = slice(query_start, query_start + query_len), slice(kv_start, kv_start + kv_len)
        attend_segment(
            query[rows],
            keys[kv_rows],
            values[kv_rows],
            query_position=position,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            out=out[rows],
            lse=None if lse is None else lse[rows],
        )


def _check(query, keys, values, segments: Segments, out, lse, sinks) -> None:
    tokens, num_heads, head_dim = query.shape
    capacity, num_kv_heads, key_dim = keys.shape
    if values.shape != keys.shape or out.shape != query.shape or key_dim != head_dim or num_heads % num_kv_heads:
        raise ValueError(
            f"attend: shapes disagree: query {tuple(query.shape)}, keys {tuple(keys.shape)}, "
            f"values {tuple(values.shape)}, out {tuple(out.shape)}"
        )
    if not query.dtype == keys.dtype == values.dtype == out.dtype:
        raise ValueError(f"attend: dtypes differ: {query.dtype}, {keys.dtype}, {values.dtype}, {out.dtype}")
    if lse is not None and (
        lse.dtype != torch.float32 or lse.shape != query.shape[:2] or lse.stride(1) != 1 or lse.device != query.device
    ):
        raise ValueError(
            f"attend: lse must be float32 {(tokens, num_heads)} with a contiguous last dim, on {query.device}; it is "
            f"{lse.dtype} {tuple(lse.shape)} with strides {lse.stride()}, on {lse.device}"
        )
    if sinks is not None and (
        sinks.dtype != torch.float32
        or sinks.shape != (num_heads,)
        or not sinks.is_contiguous()
        or sinks.device != query.device
    ):
        raise ValueError(
            f"attend: sinks must be contiguous float32 {(num_heads,)} on {query.device}; they are {sinks.dtype} "
            f"{tuple(sinks.shape)} on {sinks.device}"
        )
    if segments.query_end > tokens or segments.kv_end > capacity:
        raise ValueError(
            f"attend: segments use {segments.query_end} query rows and {segments.kv_end} KV rows, "
            f"the tensors have {tokens} and {capacity}"
        )
