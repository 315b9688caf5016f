"""Attention of one segment with torch operators: runs on any device, and is the reference for native kernels.

Grouped-query attention is expressed by folding query heads into ``[kv_heads, group]`` and viewing K and V with stride
0 over the group. The ``enable_gqa`` option of torch copies K and V on the CPU and is many times slower.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import scaled_dot_product_attention

QUERY_BLOCK_TOKENS = 256
MASK_ELEMENTS = 1 << 22  # of one mask: bounds memory for long contexts
SCORE_ELEMENTS = 1 << 20  # of one float32 score matrix of the explicit form: it is gone over often


def attend_segment(
    query, keys, values, *, query_position: int, scale: float, window: int, softcap: float, sinks=None, out, lse=None
) -> None:
    """Causal attention of one segment (see Segments); writes ``out`` and, where given, ``lse``.

    query, out: [query_len, num_heads, D]; keys, values: [kv_len, num_kv_heads, D]; one dtype, last dim contiguous;
    lse: float32 [query_len, num_heads]; sinks: float32 [num_heads].
    """
    # what no query sees, and then the queries that see nothing, are cut off: every row below sees something
    past, kv_len = query_position, len(keys)
    stop_kv = min(kv_len, past + len(query))
    first_kv = min(max(0, past - window + 1), stop_kv) if window else 0
    keys, values, kv_len, past = keys[first_kv:stop_kv], values[first_kv:stop_kv], stop_kv - first_kv, past - first_kv
    first = max(0, -past)
    stop = len(query) if kv_len > 0 else first
    if window:
        stop = min(stop, kv_len + window - 1 - past)
    if stop - first < len(query):
        for part in (slice(0, first), slice(max(first, stop), None)):
            out[part].zero_()
            if lse is not None:
                lse[part] = float("-inf") if sinks is None else sinks
        if stop <= first:
            return
        query, out, past = query[first:stop], out[first:stop], past + first
        lse = None if lse is None else lse[first:stop]
    _attend_rows(query, keys, values, past, scale, window, softcap, sinks, out, lse)


def _attend_rows(query, keys, values, past: int, scale, window, softcap, sinks, out, lse) -> None:
    query_len, num_heads, _ = query.shape
    kv_len, num_kv_heads, _ = keys.shape
    if window >= past + query_len:
        window = 0
    reach = past + query_len if window else kv_len
    if softcap or sinks is not None or lse is not None:
        block_tokens = max(1, min(query_len, SCORE_ELEMENTS // (num_heads * reach)))
        attend_block = _explicit_block
    elif query_len == 1:
        block_tokens, attend_block = 1, _decode_block
    elif query_len == kv_len and not past and not window:
        block_tokens, attend_block = query_len, _square_block
    else:
        block_tokens = QUERY_BLOCK_TOKENS
        while block_tokens > 8 and block_tokens * reach > MASK_ELEMENTS:
            block_tokens //= 2
        attend_block = _masked_block
    folded = (num_kv_heads, num_heads // num_kv_heads)
    query, out = query.unflatten(1, folded), out.unflatten(1, folded)
    lse = None if lse is None else lse.unflatten(1, folded)
    sinks = None if sinks is None else sinks.view(*folded, 1)
    for start in range(0, query_len, block_tokens):
        stop = min(start + block_tokens, query_len)
        first_kv = max(0, past + start - window + 1) if window else 0
        visible = slice(first_kv, min(past + stop, kv_len))
        result = attend_block(
            query[start:stop],
            keys[visible],
            values[visible],
            past=past + start - first_kv,
            scale=scale,
            window=window,
            softcap=softcap,
            block_tokens=block_tokens,
            sinks=sinks,
            lse=None if lse is None else lse[start:stop],
        )
        out[start:stop].copy_(result)


def _decode_block(query, keys, values, *, scale, **_):
    # the group takes the place of the query positions: K and V are read once a KV head, without a mask
    result = scaled_dot_product_attention(query, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scale=scale)
    return result


def _grouped(query, keys, values):
    """Views [kv_heads, group, tokens, D] of query [tokens, kv_heads, group, D] and K, V [tokens, kv_heads, D]."""
    group = query.shape[2]
    keys, values = (slab.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for slab in (keys, values))
    return query.permute(1, 2, 0, 3), keys, values


def _square_block(query, keys, values, *, scale, **_):
    result = scaled_dot_product_attention(*_grouped(query, keys, values), is_causal=True, scale=scale)
    return result.permute(2, 0, 1, 3)


def _masked_block(query, keys, values, *, past, scale, window, block_tokens, **_):
    mask = _causal_band(len(query), len(keys), past, window, block_tokens, query.dtype, query.device)
    result = scaled_dot_product_attention(*_grouped(query, keys, values), attn_mask=mask, scale=scale)
    return result.permute(2, 0, 1, 3)


def _explicit_block(query, keys, values, *, past, scale, window, softcap, sinks, lse, **_):
    # the heads of a group are rows of one product a KV head, so that K and V are not copied for each of them
    query_len, num_kv_heads, group, head_dim = query.shape
    kv_len = len(keys)
    keys, values = (slab.float().transpose(0, 1) for slab in (keys, values))
    rows = query.float().transpose(0, 1).reshape(num_kv_heads, query_len * group, head_dim)
    scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(scale)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    if window or past < kv_len - 1:
        band = _causal_band(query_len, kv_len, past, window, query_len, torch.float32, scores.device)
        scores.view(num_kv_heads, query_len, group, kv_len).add_(band[:, None])
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    sums = weights.sum(-1, keepdim=True)
    result = torch.bmm(weights, values).div_(sums).view(num_kv_heads, query_len, group, -1)
    total = highest.add_(sums.log_()).view(num_kv_heads, query_len, group)
    if sinks is not None:
        by_head = sinks.transpose(1, 2)
        result *= sink_share(total, by_head)
        total = torch.logaddexp(total, by_head)
    if lse is not None:
        lse.copy_(total.transpose(0, 1))
    return result.transpose(0, 1)


def sink_share(lse, sinks):
    """What the result without sinks is multiplied by, [..., 1]: from its log-sum-exp and the sinks of its rows."""
    return torch.sigmoid(lse - sinks)[..., None]


def _causal_band(query_len: int, kv_len: int, past: int, window: int, block_tokens: int, dtype, device):
    """Additive mask [query_len, kv_len] whose query row ``t`` sees ``past + t - window + 1 .. past + t``.

    Causal masks of one block size are all slices of one band, so chunks of any offset share one tensor.
    """
    if not window:
        past = min(past, kv_len)
    span = max(64, 1 << (past - 1).bit_length()) if past else 64
    band = _band(block_tokens, span, window, dtype, device)
    return band[:query_len, span - past : span - past + kv_len]


@lru_cache(maxsize=16)
def _band(block_tokens: int, span: int, window: int, dtype, device):
    """[block_tokens, span + block_tokens]: row t is open for columns ``span + t - window + 1 .. span + t``."""
    row = torch.arange(block_tokens, device=device)[:, None]
    column = torch.arange(-span, block_tokens, device=device)
    closed = column > row
    if window:
        closed |= column <= row - window
    return torch.zeros(closed.shape, dtype=dtype, device=device).masked_fill_(closed, float("-inf"))
