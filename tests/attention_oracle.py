"""Attention by its definition in float64, and random ragged inputs: what tests of both attention rooms compare with."""

import numpy
import torch

from flexrun.attention import Segments


def oracle(query, keys, values, segments, *, scale, window=0, softcap=0.0, sinks=None):
    """(out, lse) in float64 with explicit masks; rows that see nothing, or of no segment, are 0 and -inf."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:2], float("-inf"), dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    keys, values = (slab.double().repeat_interleave(group, dim=1) for slab in (keys, values))
    for (query_start, query_len, kv_start, kv_len), first in zip(segments.rows, segments.query_position.tolist()):
        position, seen = torch.arange(first, first + query_len)[:, None], torch.arange(kv_len)
        visible = (seen <= position) & (seen > position - (window or 1 << 40))
        rows, kv_rows = slice(query_start, query_start + query_len), slice(kv_start, kv_start + kv_len)
        scores = torch.einsum("qhd,khd->hqk", query[rows].double(), keys[kv_rows]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:  # a column of its own, whose value is nothing
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, query_len, 1)], dim=-1)
        lse[rows] = scores.logsumexp(-1).T
        weights = scores.softmax(-1).nan_to_num(0.0)[..., :kv_len]
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values[kv_rows])
    return out, lse


def make(query_lens, kv_lens, *, num_heads, num_kv_heads, head_dim, dtype, query_position=None, gap=3):
    """q inside a fused qkv buffer, K and V interleaved in one slab, rows of other sequences (NaN) between."""
    generator = torch.Generator().manual_seed(sum(kv_lens) + head_dim)
    query_start = numpy.cumsum([0, *query_lens[:-1]])
    kv_start = numpy.cumsum([gap, *(length + gap for length in kv_lens[:-1])])
    segments = Segments(query_start, query_lens, kv_start, kv_lens, query_position)
    fused = torch.randn(segments.query_end, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    content = torch.randn(segments.kv_end + gap, num_kv_heads, 2 * head_dim, generator=generator).to(dtype)
    slab = torch.full_like(content, float("nan"))
    for _, _, start, length in segments.rows:
        slab[start : start + length] = content[start : start + length]
    return fused[:, :num_heads], slab[..., :head_dim], slab[..., head_dim:], segments
