"""Times products with 4- and 8-bit matrices: on a CPU the decoder's own functions, straight from codes; on a GPU how
fast codes become weights again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor

from flexrun.compress import GroupFormat, GroupwiseMatrix, quantise
from flexrun.compress.groupwise import split
from flexrun.core import DTYPES
from flexrun.hardware.curves import CompressedReading, fit_compressed
from flexrun.hardware.effort import MIDDLE, TINY, Bench
from flexrun.hardware.profile_compute import MODULES, layer_spec, module_call, work_of
from flexrun.hardware.rates import CompressedRates, Rates

GROUP = 64
BITS = (4, 8)
KINDS = {**{str(bits): (bits, 16) for bits in BITS}, **{f"w{bits}a8": (bits, 8) for bits in BITS}}  # and of activations
ROWS = (1, 6, 8, 64, 256, 512)  # of a call; the kernels take few rows, up to about 6, another way
TIMED = ("attention_inputs", "mlp")


def compressed_rates(
    bench: Bench, dtype: str, rates: Rates, overhead_seconds: float
) -> tuple[dict[str, CompressedRates], float, float]:
    """(those of each of KINDS, root mean square of the relative errors, median spread) of products in one dtype.

    rates, overhead_seconds: of the dtype's own matrices and of a step; what activations take is that of theirs.
    """
    bench.advance(f"{bench.label} {dtype} compressed weights")
    shape = TINY if bench.pool_bytes < 64 << 20 else MIDDLE
    spec = layer_spec(shape, dtype)
    pool = torch.randint(0, 256, (max(bench.pool_bytes // 2, 1),), dtype=torch.uint8)
    found, residuals, spreads = {}, [], []
    for kind, (bits, activation_bits) in KINDS.items():
        form, taken = GroupFormat(bits, GROUP), []
        for module in TIMED:
            copies = list(_copies(pool, spec, module, form, activation_bits))
            work = work_of(spec, module)
            stored = sum(each.data.nbytes for each in copies[0].values() if isinstance(each, GroupwiseMatrix))
            readings = bench.read_all([module_call(spec, module, copies, rows, bench.device) for rows in ROWS])
            for rows, reading in zip(ROWS, readings):
                beside = rates.activation_seconds(rows, work, spec.dtype_bytes) + overhead_seconds
                taken.append(CompressedReading(rows, work.weight_elements, stored, reading.seconds, beside))
            spreads += [each.spread for each in readings]
        found[kind], residual = fit_compressed(taken)
        residuals.append(residual)
    return found, max(residuals), median(spreads)


def _copies(pool: Tensor, spec, module: str, form: GroupFormat, activation_bits: int = 16) -> Iterator[dict]:
    """The weights of one module over and over, until the pool is used up; at least one. Any bytes are codes."""
    shapes = {tensor.name: tensor.shape for tensor in spec.layer_tensors(0) if tensor.name in MODULES[module]}
    nbytes = sum(form.nbytes(shape) for shape in shapes.values() if len(shape) == 2)
    for start in range(0, max(len(pool) - nbytes, 0) + 1, -(-nbytes // 64) * 64):
        weights = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                weights[name] = torch.ones(shape, dtype=spec.torch_dtype)
                continue
            data = pool[start : start + form.nbytes(shape)]
            if len(data) < form.nbytes(shape):  # a pool smaller than one matrix
                data = torch.zeros(form.nbytes(shape), dtype=torch.uint8)
            split(data, shape, form)[1].fill_(1e-3)
            weights[name] = GroupwiseMatrix(data, shape, form, spec.torch_dtype, activation_bits)
            start += form.nbytes(shape)
        yield weights


def dequantise_bytes_per_second(bench: Bench, dtype: str) -> float:
    """Bytes of ``dtype`` that 4-bit codes become in a second."""
    bench.advance(f"{bench.label} compressed weights")
    shape, form = (MIDDLE.intermediate_size // 2, MIDDLE.hidden_size), GroupFormat(4, GROUP)
    data = quantise(torch.randn(shape).mul_(0.02), form)
    count = max(bench.pool_bytes // 2 // len(data), 1)
    pool = torch.empty(count, len(data), dtype=torch.uint8, device=bench.device)
    pool.copy_(data)
    matrices = itertools.cycle([GroupwiseMatrix(each, shape, form, DTYPES[dtype]) for each in pool])
    (reading,) = bench.read_all([lambda: next(matrices).dequantised()])
    return shape[0] * shape[1] * DTYPES[dtype].itemsize / reading.seconds


def with_compressed(bench: Bench, rates: dict[str, Rates], overhead_seconds: float, noise: dict, misfit: dict) -> dict:
    """The rates of a CPU's dtypes, with those of compressed matrices."""
    result = {}
    for dtype, each in rates.items():
        found, residual, spread = compressed_rates(bench, dtype, each, overhead_seconds)
        misfit[f"{bench.label} compressed {dtype}"], noise[f"{bench.label} compressed {dtype}"] = residual, spread
        result[dtype] = dataclasses.replace(each, compressed=found)
    return result
