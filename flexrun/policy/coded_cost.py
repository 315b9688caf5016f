"""What a compressed KV cache adds to the work of who makes it and who attends it. Counts are numbers or arrays."""

from __future__ import annotations

from collections.abc import Sequence

from flexrun.hardware import Processor
from flexrun.models.spec import ModelSpec
from flexrun.placement import DENSE_TOKENS

CODING_ACCESSES = 12  # of each new key and value in float32, where it is compressed and, in a prompt, brought back
BROUGHT_BACK_ACCESSES = 11  # the same, where a GPU brings back what it attends: kernels of the CPU read codes


def coding_seconds(spec: ModelSpec, processor: Processor, tokens):
    """Taking new tokens into the cache, in one layer."""
    return _seconds(spec, processor, tokens * CODING_ACCESSES)


def brought_back_seconds(spec: ModelSpec, gpu: Processor, counts: Sequence):
    """Bringing back what is attended, in one layer, so many tokens at a time; counts: see attention_cost."""
    tokens = counts[1] - counts[0]
    return _seconds(spec, gpu, tokens * BROUGHT_BACK_ACCESSES) + tokens / DENSE_TOKENS * gpu.step_overhead_seconds


def _seconds(spec: ModelSpec, processor: Processor, accesses):
    rate = processor.rates_of(spec.dtype).activation_bytes_per_second
    return accesses * spec.kv_elements_per_token * 4 / rate
