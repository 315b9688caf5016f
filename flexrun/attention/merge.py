"""Joins attention over two parts of a KV cache exactly, so that one sequence's KV may lie in two places."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexrun.attention.host import attend
from flexrun.attention.segments import Segments


class KVPart(NamedTuple):
    """One part of the KV rows of each segment.

    keys, values: [capacity, num_kv_heads, D] on the part's device; segments: one half of ``Segments.split_kv``.
    attend: what executes it, with the signature of ``flexrun.attention.attend``.
    """

    keys: Tensor
    values: Tensor
    segments: Segments
    attend: Callable = attend


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor | None = None) -> Tensor:
    """Attention over the union of two disjoint sets of KV rows, from the attention over each. Returns ``out``.

    out_a, out_b, out: [tokens, num_heads, D] of one dtype; ``out`` may be ``out_a`` or ``out_b``.
    lse_a, lse_b: float32 [tokens, num_heads], natural log-sum-exp of the scores of each part, -inf where a row saw
    nothing; lse, where given, gets that of the union and may be ``lse_a`` or ``lse_b``. A row that saw nothing in
    either part becomes zeros.

    With ``w = exp(lse_a) / (exp(lse_a) + exp(lse_b))`` the softmax over the union is ``w`` times that over the first
    and ``1 - w`` times that over the second, whatever the values; computed in float32.
    """
    nothing = torch.isneginf(lse_a) & torch.isneginf(lse_b)
    weight = torch.sigmoid(lse_a - lse_b).masked_fill_(nothing, 0.0)[..., None]
    out.copy_(torch.lerp(out_b.float(), out_a.float(), weight).masked_fill_(nothing[..., None], 0.0))
    if lse is not None:
        torch.logaddexp(lse_a, lse_b, out=lse)
    return out


def attend_split(
    query: Tensor,
    first: KVPart,
    second: KVPart,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor,
    lse: Tensor | None = None,
) -> Tensor:
    """Causal attention over a KV cache that is split by token: ``first`` here, ``second`` there. Returns ``out``.

    As ``attend`` over the whole, with the KV of each part on that part's device: queries are copied there and partial
    results back to the query's device, where they are merged. The sinks join the first part, and so count once.
    """
    partial = [
        _attend_part(query, part, scale, window, softcap, part_sinks)
        for part, part_sinks in ((first, sinks), (second, None))
    ]
    return merge(*partial[0], *partial[1], out, lse)


def _attend_part(query: Tensor, part: KVPart, scale, window, softcap, sinks) -> tuple[Tensor, Tensor]:
    there = query.to(part.keys.device)
    # rows of no segment are merged too: they must hold a number
    out = torch.zeros(there.shape, dtype=there.dtype, device=there.device)
    lse = torch.full(there.shape[:2], float("-inf"), device=there.device)
    part.attend(
        there,
        part.keys,
        part.values,
        part.segments,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(there.device),
        out=out,
        lse=lse,
    )
    return out.to(query.device), lse.to(query.device)
