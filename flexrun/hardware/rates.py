"""The parts of a machine as numbers, and the few formulas that turn those numbers into seconds. Pure data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from flexrun.errors import ConfigError
from flexrun.hardware.document import require_range


@dataclass(frozen=True)
class Transfer:
    """One lane that moves bytes: ``latency_seconds`` a request, then ``bytes_per_second``."""

    bytes_per_second: float
    latency_seconds: float = 0.0

    def __post_init__(self):
        require_range(self, ("bytes_per_second",), 0, above=True)
        require_range(self, ("latency_seconds",), 0)

    def seconds(self, nbytes: float) -> float:
        return self.latency_seconds + nbytes / self.bytes_per_second


@dataclass(frozen=True)
class LinearWork:
    """The linear layers of one module, as the formulas see them.

    weight_elements: of the matrices together. width: side of the typical matrix, a weighted geometric mean.
    activation_elements: inputs and outputs of one row together.
    """

    weight_elements: int
    width: float
    activation_elements: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, int]]) -> LinearWork:
        """From the (inputs, outputs) of each matrix."""
        shapes = tuple(shapes)
        elements = sum(inputs * outputs for inputs, outputs in shapes)
        width = sum((inputs * outputs) ** 1.5 for inputs, outputs in shapes) / max(elements, 1)
        return cls(elements, max(width, 1.0), sum(inputs + outputs for inputs, outputs in shapes))

    def part(self, share: float) -> LinearWork:
        """That share of each of the matrices."""
        return LinearWork(self.weight_elements * share, self.width, self.activation_elements * share)


@dataclass(frozen=True)
class CompressedRates:
    """Products of a CPU with matrices of 4 or 8 bits, straight from their codes.

    few_bytes_per_second: codes and factors, of calls of at most ``few_rows`` rows; many_bytes_per_second: of larger
    ones, which make weights of the codes first and multiply then, at matmul_flops_per_second, once for every
    ``rows_at_once`` rows (0: for all of them).
    """

    matmul_flops_per_second: float
    few_bytes_per_second: float
    many_bytes_per_second: float
    few_rows: int = 0
    rows_at_once: int = 0

    def __post_init__(self):
        speeds = ("matmul_flops_per_second", "few_bytes_per_second", "many_bytes_per_second")
        require_range(self, speeds, 0, above=True)
        require_range(self, ("few_rows", "rows_at_once"), 0)

    def seconds(self, rows: float, elements: float, nbytes: float) -> float:
        """Of one call, apart from its inputs and outputs."""
        products = 2.0 * rows * elements / self.matmul_flops_per_second
        if rows <= self.few_rows:
            return products + nbytes / self.few_bytes_per_second
        times = math.ceil(rows / self.rows_at_once) if self.rows_at_once else 1
        return products + times * nbytes / self.many_bytes_per_second


@dataclass(frozen=True)
class Rates:
    """What a processor reaches in one dtype.

    matmul_flops_per_second: linear layers with many rows and wide matrices. half_width: geometric mean of a
    matrix's two sides at which half of that is reached (0: width does not matter).
    weight_bytes_per_second: reading weights when there are few rows (memory bandwidth, as a matmul reaches it).
    sharpness: p of the smooth roofline ``(compute^p + memory^p)^(1/p)``; large is a hard corner.
    activation_bytes_per_second: norms, activations, residuals and copies, a byte of each linear layer's input and
    output.
    decode_kv_bytes_per_second: attention of single query tokens, a byte of K and V.
    prefill_attention_flops_per_second: attention of prompts, causal products counted only.
    plain_weight_share: part of weight_bytes_per_second that remains for weights in the layout of a checkpoint, where
    the matmul has a layout of its own that only weights resident on the CPU are brought into.
    compressed: of a CPU, products with matrices of 4 and 8 bits, by "4" and "8", and with activations rounded to 8 bits
    by "w4a8" and "w8a8".
    """

    matmul_flops_per_second: float
    weight_bytes_per_second: float
    activation_bytes_per_second: float
    decode_kv_bytes_per_second: float
    prefill_attention_flops_per_second: float
    half_width: float = 0.0
    sharpness: float = 4.0
    plain_weight_share: float = 1.0
    compressed: dict[str, CompressedRates] = field(default_factory=dict)

    def __post_init__(self):
        speeds = (
            "matmul_flops_per_second",
            "weight_bytes_per_second",
            "activation_bytes_per_second",
            "decode_kv_bytes_per_second",
            "prefill_attention_flops_per_second",
        )
        require_range(self, speeds, 0, above=True)
        require_range(self, ("half_width",), 0)
        require_range(self, ("plain_weight_share",), 0, 1, above=True)
        for bits in self.compressed:
            if bits not in ("4", "8", "w4a8", "w8a8"):
                raise ConfigError(f"compressed rates of {bits!r} bits", "give those of 4, 8, w4a8 and w8a8")
        require_range(self, ("sharpness",), 1)  # 1 adds compute and memory; below it, they would take longer than both

    def linear_seconds(
        self,
        rows: float,
        work: LinearWork,
        dtype_bytes: int,
        weight_bytes: float | None = None,
        *,
        plain: bool = False,
    ) -> float:
        """One call of a module over ``rows`` token rows, without its fixed overhead.

        dtype_bytes: of an activation. weight_bytes: read for the weights together (None: stored in the same dtype).
        plain: the weights are streamed, or reside on a device, in the layout of the checkpoint.
        """
        products = self.product_seconds(rows, work, dtype_bytes, weight_bytes, plain=plain)
        return products + self.activation_seconds(rows, work, dtype_bytes)

    def product_seconds(
        self,
        rows: float,
        work: LinearWork,
        dtype_bytes: int,
        weight_bytes: float | None = None,
        *,
        plain: bool = False,
    ) -> float:
        """Of ``linear_seconds``, weights and products."""
        peak = self.matmul_flops_per_second / (1.0 + self.half_width / work.width)
        compute = 2.0 * rows * work.weight_elements / peak
        nbytes = work.weight_elements * dtype_bytes if weight_bytes is None else weight_bytes
        memory = nbytes / (self.weight_bytes_per_second * (self.plain_weight_share if plain else 1.0))
        high, low = max(compute, memory), min(compute, memory)
        return high * (1.0 + (low / high) ** self.sharpness) ** (1.0 / self.sharpness) if high else 0.0

    def activation_seconds(self, rows: float, work: LinearWork, dtype_bytes: int) -> float:
        """The rest of ``linear_seconds``."""
        return rows * work.activation_elements * dtype_bytes / self.activation_bytes_per_second


@dataclass(frozen=True)
class Processor:
    """A GPU, or the CPU with all its cores.

    rates: by dtype name. step_overhead_seconds: fixed cost of one step (launches, interpreter). row_overhead_seconds:
    of one sampled row. sample_element_seconds: of one logit (cast, argmax or draw). dequantise_bytes_per_second: 4-
    and 8-bit weights, a byte of the dtype they become, beside reading their own bytes (0: not known); a CPU that has
    rates of compressed products needs none.
    """

    rates: dict[str, Rates]
    step_overhead_seconds: float = 0.0
    row_overhead_seconds: float = 0.0
    sample_element_seconds: float = 0.0
    dequantise_bytes_per_second: float = 0.0

    def __post_init__(self):
        overheads = ("step_overhead_seconds", "row_overhead_seconds", "sample_element_seconds")
        require_range(self, (*overheads, "dequantise_bytes_per_second"), 0)
        if not self.rates:
            raise ConfigError("rates is empty", "give the rates of at least one dtype, for example bfloat16")

    def rates_of(self, dtype: str) -> Rates:
        """Raises ConfigError where the dtype was not measured."""
        if dtype not in self.rates:
            raise ConfigError(
                f"the hardware profile has no rates for {dtype}", f"it has {', '.join(self.rates)}; measure again"
            )
        return self.rates[dtype]
