"""Turns readings at several sizes into the few numbers of a smooth curve, and says how well the curve fits them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy
from scipy.optimize import least_squares, nnls

from flexrun import native
from flexrun.errors import ExecutionError
from flexrun.hardware.rates import CompressedRates, LinearWork, Rates, Transfer

# (low, high) of what is searched for, far beyond any machine of today
_SPEED = (1e6, 1e17)
_HALF_WIDTH = (0.0, 8192.0)
_SHARPNESS = (1.0, 16.0)
_PLAIN_SHARE = (0.1, 1.0)
_OVERHEAD_FACTOR = (0.3, 3.0)


@dataclass(frozen=True)
class LinearReading:
    """One timed call of a module. plain: see ``Rates.linear_seconds``."""

    module: str
    rows: int
    work: LinearWork
    seconds: float
    plain: bool = False


@dataclass(frozen=True)
class CompressedReading:
    """One timed call of a module with compressed matrices. beside_seconds: of it, what is no product."""

    rows: int
    elements: float
    nbytes: float
    seconds: float
    beside_seconds: float


@dataclass(frozen=True)
class LinearFit:
    """``rates`` fitted for ``Rates.linear_seconds`` alone: what they say of attention means nothing.

    overhead_factor: how much more a module's overhead is when it has work: threads are woken, or (below 1, on a GPU)
    launches hide behind the work. residual: root mean square of the relative errors.
    """

    rates: Rates
    overhead_factor: float
    residual: float


def fit_transfer(readings: Sequence[tuple[float, float]]) -> tuple[Transfer, float]:
    """Latency and speed from (bytes, seconds), and the root mean square of the relative errors.

    Least squares on relative errors, neither number negative. Raises ExecutionError where time does not grow with size.
    """
    sizes, seconds = numpy.array(readings, dtype=float).T
    largest = sizes.max()
    matrix = numpy.stack([1.0 / seconds, sizes / largest / seconds], axis=1)
    (latency, seconds_of_largest), norm = nnls(matrix, numpy.ones(len(seconds)))
    if not seconds_of_largest:
        raise ExecutionError(
            "transfers of any size took the same time, so no speed can be told", "close other programs, measure again"
        )
    transfer = Transfer(float(largest / seconds_of_largest), float(latency))
    return transfer, float(norm / math.sqrt(len(seconds)))


def fit_linear(readings: Sequence[LinearReading], overheads: Mapping[str, float], dtype_bytes: int) -> LinearFit:
    """The curve of ``Rates.linear_seconds`` through readings of one dtype, by least squares on log errors.

    overheads: seconds of each module when it has next to nothing to do. A soft loss counts errors beyond a tenth less,
    so that one disturbed reading does not bend the curve.
    """
    seconds = numpy.log([reading.seconds for reading in readings])
    fixed = numpy.array([overheads[reading.module] for reading in readings])
    names, start, low, high = zip(*_parameters(readings, dtype_bytes))

    def errors(point: numpy.ndarray) -> numpy.ndarray:
        values = dict(zip(names, point))
        rates = _rates_at(values)
        work = [rates.linear_seconds(each.rows, each.work, dtype_bytes, plain=each.plain) for each in readings]
        return numpy.log(work + values["overhead_factor"] * fixed) - seconds

    start = numpy.clip(start, numpy.add(low, 1e-6), numpy.subtract(high, 1e-6))  # strictly inside, as is required
    solution = least_squares(
        errors, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, x_scale="jac", max_nfev=200
    )
    values = dict(zip(names, solution.x.tolist()))
    residual = float(numpy.sqrt(numpy.mean(errors(solution.x) ** 2)))
    rates = _rates_at(values)
    return LinearFit(replace(rates, half_width=round(rates.half_width, 1)), values["overhead_factor"], residual)


def _parameters(readings: Sequence[LinearReading], dtype_bytes: int) -> Iterator[tuple[str, float, float, float]]:
    """(name, start, low, high) of what is searched for: logs of speeds, the width in thousands, 1 / sharpness."""
    flops = max(2.0 * reading.rows * reading.work.weight_elements / reading.seconds for reading in readings)
    nbytes = max(reading.work.weight_elements * dtype_bytes / reading.seconds for reading in readings)
    low, high = (math.log(bound) for bound in _SPEED)
    yield "matmul", math.log(1.2 * flops), low, high
    yield "weight", math.log(1.2 * nbytes), low, high
    yield "activation", math.log(2.0 * nbytes), low, high
    yield "half_width", 0.1, _HALF_WIDTH[0] / 1000, _HALF_WIDTH[1] / 1000
    yield "smoothness", 1 / 3, 1 / _SHARPNESS[1], 1 / _SHARPNESS[0]
    if len({reading.plain for reading in readings}) == 2:
        yield "plain_share", 0.7, *_PLAIN_SHARE
    yield "overhead_factor", 1.0, *_OVERHEAD_FACTOR


def _rates_at(point: dict[str, float]) -> Rates:
    return Rates(
        matmul_flops_per_second=math.exp(point["matmul"]),
        weight_bytes_per_second=math.exp(point["weight"]),
        activation_bytes_per_second=math.exp(point["activation"]),
        decode_kv_bytes_per_second=1.0,
        prefill_attention_flops_per_second=1.0,
        half_width=1000 * point["half_width"],
        sharpness=1 / point["smoothness"],
        plain_weight_share=point.get("plain_share", 1.0),
    )


def fit_compressed(readings: Sequence[CompressedReading]) -> tuple[CompressedRates, float]:
    """The rates whose relative errors are least in the sense of ``fit_linear``, and the root mean square of these.

    What counts as few rows is tried at every count up to which there is a reading.
    """
    counts = sorted({reading.rows for reading in readings})
    return min((_fit_few(readings, few) for few in (0, *counts[:-1])), key=lambda fit: fit[1])


def _fit_few(readings: Sequence[CompressedReading], few_rows: int) -> tuple[CompressedRates, float]:
    seconds = numpy.log([reading.seconds for reading in readings])

    def rates_at(point: numpy.ndarray) -> CompressedRates:
        matmul, few, many = (math.exp(value) for value in point)
        return CompressedRates(matmul, few if few_rows else many, many, few_rows, native.ROWS_AT_ONCE)

    def errors(point: numpy.ndarray) -> numpy.ndarray:
        rates = rates_at(point)
        work = [rates.seconds(each.rows, each.elements, each.nbytes) + each.beside_seconds for each in readings]
        return numpy.log(work) - seconds

    flops = max(2.0 * reading.rows * reading.elements / reading.seconds for reading in readings)
    nbytes = max(reading.nbytes / reading.seconds for reading in readings)
    start = numpy.log([1.2 * flops, 1.2 * nbytes, 0.6 * nbytes])
    bounds = numpy.log(_SPEED)
    solution = least_squares(errors, start, bounds=(bounds[0], bounds[1]), loss="soft_l1", f_scale=0.1, max_nfev=100)
    return rates_at(solution.x), float(numpy.sqrt(numpy.mean(errors(solution.x) ** 2)))
