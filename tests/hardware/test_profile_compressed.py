"""Rates of products with compressed matrices: of few rows and of many, of the decoder's own functions."""

import itertools

import numpy
import pytest
import torch

from flexrun import native
from flexrun.compress import GroupFormat, GroupwiseMatrix
from flexrun.hardware import CompressedRates, Rates, profile_compressed
from flexrun.hardware.curves import CompressedReading, fit_compressed
from flexrun.hardware.effort import Bench
from flexrun.hardware.timing import Reading

RATES = Rates(4e11, 2e10, 1e10, 3e10, 2e11)
KERNEL = CompressedRates(7e11, 4e10, 1.5e10, few_rows=6, rows_at_once=native.ROWS_AT_ONCE)
ROWS = (1, 6, 8, 16, 64, 256)


def readings_of(rates: CompressedRates, noise: float = 0.0, beside: float = 3e-5) -> list[CompressedReading]:
    draw = numpy.random.default_rng(0)
    result = []
    for elements, rows in itertools.product((4e6, 5e7), ROWS):
        seconds = rates.seconds(rows, elements, elements * 0.5625) + beside
        result.append(CompressedReading(rows, elements, elements * 0.5625, seconds * draw.lognormal(0, noise), beside))
    return result


def test_the_fit_finds_both_ways_and_where_they_meet():
    found, residual = fit_compressed(readings_of(KERNEL))
    assert found.few_rows == 6 and residual < 1e-3
    for name in ("matmul_flops_per_second", "few_bytes_per_second", "many_bytes_per_second"):
        assert getattr(found, name) == pytest.approx(getattr(KERNEL, name), rel=0.01)


def test_noisy_readings_are_described_within_their_noise():
    found, residual = fit_compressed(readings_of(KERNEL, noise=0.05))
    assert residual < 0.08
    for rows in ROWS:
        assert found.seconds(rows, 5e7, 3e7) == pytest.approx(KERNEL.seconds(rows, 5e7, 3e7), rel=0.12)


def test_one_way_for_all_rows_is_found_as_such():
    found, residual = fit_compressed(
        readings_of(CompressedRates(7e11, 1.5e10, 1.5e10, rows_at_once=native.ROWS_AT_ONCE))
    )
    assert residual < 1e-3
    assert found.seconds(1, 5e7, 3e7) == pytest.approx(2e-3, rel=0.08)


def test_what_is_timed_are_the_decoder_s_functions_with_compressed_matrices(monkeypatch, tiny_effort):
    """The calls run; readings made up of the rates of a kernel give back these rates."""
    spec = profile_compressed.layer_spec(profile_compressed.TINY, "bfloat16")
    timed = itertools.product(profile_compressed.KINDS.values(), profile_compressed.TIMED)

    def read_all(self, calls, **settings):
        for call in calls:
            call()
        (bits, _), module = next(timed)
        work, form = profile_compressed.work_of(spec, module), GroupFormat(bits, profile_compressed.GROUP)
        shapes = [each.shape for each in spec.layer_tensors(0) if each.name in profile_compressed.MODULES[module]]
        stored = sum(form.nbytes(shape) for shape in shapes if len(shape) == 2)
        beside = [RATES.activation_seconds(rows, work, 2) + 3e-5 for rows in profile_compressed.ROWS]
        return [
            Reading(KERNEL.seconds(rows, work.weight_elements, stored) + more, 0.02)
            for rows, more in zip(profile_compressed.ROWS, beside)
        ]

    monkeypatch.setattr(Bench, "read_all", read_all)
    found, residual, spread = profile_compressed.compressed_rates(Bench(tiny_effort), "bfloat16", RATES, 3e-5)
    assert set(found) == {"4", "8", "w4a8", "w8a8"} and spread == 0.02 and residual < 0.01
    for rates in found.values():
        assert rates.matmul_flops_per_second == pytest.approx(KERNEL.matmul_flops_per_second, rel=0.05)


def test_a_gpu_is_told_how_fast_codes_become_weights(monkeypatch, tiny_effort):
    def read_all(self, calls, **settings):
        assert calls[0]().dtype is torch.float16
        return [Reading(1e-3, 0.0)]

    monkeypatch.setattr(Bench, "read_all", read_all)
    rate = profile_compressed.dequantise_bytes_per_second(Bench(tiny_effort), "float16")
    assert rate == pytest.approx(4096 * 2048 * 2 / 1e-3)


def test_copies_fill_a_pool_with_whole_modules():
    spec = profile_compressed.layer_spec(profile_compressed.TINY, "bfloat16")
    pool = torch.randint(0, 256, (100_000,), dtype=torch.uint8)
    copies = list(profile_compressed._copies(pool, spec, "mlp", GroupFormat(4, 64)))
    matrices = [each for weights in copies for each in weights.values() if isinstance(each, GroupwiseMatrix)]
    assert len(copies) > 2 and len(matrices) == 2 * len(copies)
    starts = sorted(each.data.data_ptr() for each in matrices)
    assert all(later - sooner >= 64 * 64 // 2 for sooner, later in itertools.pairwise(starts)), "none over another"
    assert all(each.dequantised().isfinite().all() for each in matrices)
