"""Seconds of the linear layers of a module on any processor of a machine, with weights of whatever bits and layout."""

from __future__ import annotations

from flexrun.errors import ConfigError
from flexrun.hardware import Hardware, LinearWork, Processor
from flexrun.models.spec import ModelSpec
from flexrun.policy.compressed import Compressed, compressed_seconds


def matmul_seconds(
    spec: ModelSpec,
    hardware: Hardware,
    processor: Processor,
    rows: float,
    work: LinearWork,
    plain: float,
    compressed: tuple[Compressed, ...] | None = None,
) -> float:
    """One call. plain: share of the weights in the layout of the checkpoint; see Rates.plain_weight_share. compressed:
    see compressed_part; a CPU multiplies straight from the codes, a GPU by weights brought back before."""
    dtype_bytes, rates = spec.dtype_bytes, processor.rates_of(spec.dtype)
    if compressed and processor is hardware.cpu:
        seconds = compressed_seconds(rates, rows, work, compressed, dtype_bytes, plain)
        if seconds is not None:
            return seconds
        stored = sum(part.nbytes for part in compressed)
        brought_back = dequantise_seconds(spec, hardware, processor, compressed)
        return rates.linear_seconds(rows, work, dtype_bytes, stored) + brought_back
    seconds = rates.linear_seconds(rows, work, dtype_bytes, plain=True) if plain else 0.0
    if plain < 1:
        packed = rates.linear_seconds(rows, work, dtype_bytes)
        seconds = plain * seconds + (1 - plain) * packed
    return seconds


def dequantise_seconds(
    spec: ModelSpec, hardware: Hardware, processor: Processor, compressed: tuple[Compressed, ...]
) -> float:
    """Bringing compressed weights back to the dtype. Raises ConfigError where the machine's profile has no rate."""
    if not (speed := processor.dequantise_bytes_per_second):
        raise ConfigError(
            f"{hardware.name}: no dequantise_bytes_per_second, so compressed weights cannot be planned",
            "set weight_bits to 16, measure again, or give the hardware file that number",
        )
    return sum(part.elements for part in compressed if part.bits < 16) * spec.dtype_bytes / speed
