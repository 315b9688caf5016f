"""Seconds of softmax(QK^T)V from counts of rows, KV tokens and pairs, also where part of the KV is attended elsewhere.

Counts are the first of passes.COLUMNS, numbers or arrays: query tokens, KV tokens, pairs, and of decoding rows how many
there are and the KV tokens they attend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy

from flexrun.hardware import Processor
from flexrun.models.spec import ModelSpec
from flexrun.steps import MicroBatchShape

# Kernels go by blocks: each row of a prompt also multiplies so many keys that its mask hides. CPU kernels, prompts of
# 32 to 1,024 tokens; a profile measures a prompt of PROFILED_TOKENS, and only what the mask leaves counts there.
HIDDEN_KEYS, PROFILED_TOKENS = 80, 512
NAMES = ("query_tokens", "kv_tokens", "query_kv_pairs", "decode_tokens", "decode_kv_tokens")


def counts_of(micro_batch: MicroBatchShape) -> list[int]:
    return [getattr(micro_batch, name) for name in NAMES]


def attention_seconds(
    spec: ModelSpec,
    processor: Processor,
    kv_bytes: float,
    window: int,
    counts: Sequence,
    above: Sequence | None = None,
):
    """Of one layer; ``kv_bytes``: of a token in it.

    above: counts of what the rows have elsewhere, which is not attended here: it holds the newest tokens of sequences,
    which windows see first. Decoding rows read KV and, where many heads share it, also wait for their products, which
    run at up to twice the rate of a prompt's as no mask is in the way; with MLA the products bind. Prompts are bound by
    their products.
    """
    rates = processor.rates_of(spec.dtype)
    flops_per_second = rates.prefill_attention_flops_per_second
    decode_pairs, prefill_pairs = _seen_pairs(window, counts)
    if above is not None:
        decode_above, prefill_above = _seen_pairs(window, above)
        decode_pairs, prefill_pairs = decode_pairs - decode_above, prefill_pairs - prefill_above
    read = kv_bytes / rates.decode_kv_bytes_per_second
    products = spec.decode_attention_flops_per_pair / flops_per_second
    decode = decode_pairs * max(read + products / 2, products)
    hidden_pairs = HIDDEN_KEYS * (prefill_pairs > 0) * (counts[0] - counts[3])
    prefill = (prefill_pairs + hidden_pairs) * spec.prefill_attention_flops_per_pair / unmasked(flops_per_second)
    return decode + prefill + processor.step_overhead_seconds


def unmasked(flops_per_second: float) -> float:
    """Rate of the products that are made, out of a profile's rate of those that count."""
    return flops_per_second * (1 + 2 * HIDDEN_KEYS / PROFILED_TOKENS)


def layers_seconds(
    spec: ModelSpec, processor: Processor, kv_bytes: float, counts: Sequence, above: Sequence | None = None
):
    """Of all layers; nothing where nothing is left to attend."""
    left = numpy.asarray(counts[1]) - (0 if above is None else above[1])
    return (left > 0) * sum(
        layers * attention_seconds(spec, processor, kv_bytes, window, counts, above)
        for window, layers in Counter(spec.layer_windows).items()
    )


def _seen_pairs(window: int, counts: Sequence) -> tuple:
    """Pairs within the window, of decoding rows and of prompts."""
    query_tokens, _, query_kv_pairs, decode_tokens, decode_kv_tokens = counts
    decode_pairs, prefill_pairs = decode_kv_tokens, query_kv_pairs - decode_kv_tokens
    if window:
        decode_pairs = numpy.minimum(decode_pairs, decode_tokens * window)
        prefill_pairs = numpy.minimum(prefill_pairs, (query_tokens - decode_tokens) * window)
    return decode_pairs, prefill_pairs


def counts_above(cached: Sequence, columns: Sequence) -> tuple:
    """What rows that are not fresh (their counts: ``cached``) have above the borders of their sequences, from the last
    COLUMNS: as MicroBatchShape.above."""
    _, kv_tokens, pairs, decode_tokens, decode_kv_tokens = columns
    prompts = cached[0] - cached[3]
    return (kv_tokens > 0) * (prompts + decode_tokens), kv_tokens, pairs, decode_tokens, decode_kv_tokens
