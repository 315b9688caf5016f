"""Times products with 4-bit matrices: what they take beyond reading fewer bytes."""

from __future__ import annotations

import itertools

import torch

from flexrun.compress import GroupFormat, GroupwiseMatrix, quantise
from flexrun.core import DTYPES
from flexrun.hardware.effort import MIDDLE, Bench
from flexrun.hardware.rates import LinearWork, Rates

FORM = GroupFormat(4, 64)
ROWS = 4  # few: then it is the weights that take the time
_LEAST_SHARE = 0.05  # of a product, that bringing weights back takes


def dequantise_bytes_per_second(bench: Bench, dtype: str, rates: Rates) -> float:
    """Bytes of ``dtype`` that codes become in a second; on a CPU within a product, beyond what its bytes explain."""
    bench.advance(f"{bench.label} compressed weights")
    shape = (MIDDLE.intermediate_size // 2, MIDDLE.hidden_size)
    data = quantise(torch.randn(shape).mul_(0.02), FORM)
    count = max(bench.pool_bytes // 2 // len(data), 1)
    pool = torch.empty(count, len(data), dtype=torch.uint8, device=bench.device)
    pool.copy_(data)
    matrices = itertools.cycle([GroupwiseMatrix(each, shape, FORM, DTYPES[dtype]) for each in pool])
    dense_bytes = shape[0] * shape[1] * DTYPES[dtype].itemsize
    if bench.device.type != "cpu":
        (reading,) = bench.read_all([lambda: next(matrices).dequantised()])
        return dense_bytes / reading.seconds
    x = torch.randn(ROWS, shape[1], device=bench.device).to(DTYPES[dtype])
    (reading,) = bench.read_all([lambda: next(matrices).multiply(x)])
    work = LinearWork.of([(shape[1], shape[0])])
    explained = rates.linear_seconds(ROWS, work, DTYPES[dtype].itemsize, len(data))
    return dense_bytes / max(reading.seconds - explained, _LEAST_SHARE * reading.seconds)
