"""Seconds of attention over shared prefixes, joined with what sequences have of their own.

Rows of many sequences attend a prefix together: they are bound by their products as those of a prompt, and its KV is
read once. Counts are those of the columns passes.PREFIX, numbers or arrays: rows, KV tokens, pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

from flexrun.steps import PassShape, Step

if TYPE_CHECKING:
    from flexrun.policy.cost import StepCosts


def prefix_seconds(costs: StepCosts, window: int, counts: Sequence):
    """Of one micro-batch in one layer."""
    spec, device, (rows, kv_tokens, pairs) = costs.spec, costs.device, counts
    rates = device.rates_of(spec.dtype)
    pairs = numpy.minimum(pairs, rows * window) if window else pairs
    products = pairs * (spec.prefill_attention_flops_per_pair / rates.prefill_attention_flops_per_second)
    read = kv_tokens * (costs.kv.row / rates.decode_kv_bytes_per_second)
    return products + read + costs.merge_seconds(rows) + device.step_overhead_seconds


def prefix_step_seconds(costs: StepCosts, step: Step, shape: PassShape) -> float:
    part = next(each for each in shape.micro_batches if each.index == step.micro_batch)
    counts = part.prefix_rows, part.prefix_kv_tokens, part.prefix_pairs
    return float(prefix_seconds(costs, costs.spec.layer_windows[step.layer], counts))


def prefix_layers_seconds(costs: StepCosts, counts: Sequence):
    """Of one micro-batch in all layers; nothing where no row attends a prefix."""
    if not numpy.any(counts[0]):
        return 0.0
    layers = Counter(costs.spec.layer_windows).items()
    return (counts[0] > 0) * sum(count * prefix_seconds(costs, window, counts) for window, count in layers)
