"""Fits recover the parameters that made the readings, also from noisy ones."""

from dataclasses import replace

import numpy
import pytest

from flexrun.errors import ExecutionError
from flexrun.hardware import LinearWork, Rates
from flexrun.hardware.curves import LinearReading, fit_linear, fit_transfer

SIZES = [1 << shift for shift in range(16, 28)]


OVERHEADS = {"inputs": 2e-5, "output": 1e-5, "mlp": 4e-5}


def works(hidden):
    return {
        "inputs": LinearWork.of([(hidden, hidden * 3 // 2)]),
        "output": LinearWork.of([(hidden, hidden)]),
        "mlp": LinearWork.of([(hidden, 8 * hidden), (4 * hidden, hidden)]),
    }


def synthetic(rates, noise=0.0, seed=0, plain=(False,)):
    generator = numpy.random.default_rng(seed)
    readings = []
    for hidden in (576, 2048, 4096):
        for module, work in works(hidden).items():
            for rows in (4, 16, 64, 256, 512):
                for is_plain in plain:
                    seconds = rates.linear_seconds(rows, work, 2, plain=is_plain) + 1.5 * OVERHEADS[module]
                    seconds *= generator.lognormal(0, noise)
                    readings.append(LinearReading(module, rows, work, seconds, is_plain))
    return readings


RATES = Rates(8e11, 3e10, 4e10, 1.0, 1.0, half_width=150.0, sharpness=3.0, plain_weight_share=0.6)


def test_transfer_without_noise_is_exact():
    transfer, residual = fit_transfer([(size, 2e-4 + size / 3e9) for size in SIZES])
    assert transfer.bytes_per_second == pytest.approx(3e9) and transfer.latency_seconds == pytest.approx(2e-4)
    assert residual == pytest.approx(0, abs=1e-9)


def test_transfer_from_noisy_readings():
    generator = numpy.random.default_rng(1)
    readings = [(size, (2e-4 + size / 3e9) * generator.lognormal(0, 0.05)) for size in SIZES]
    transfer, residual = fit_transfer(readings)
    assert transfer.bytes_per_second == pytest.approx(3e9, rel=0.05)
    assert transfer.latency_seconds == pytest.approx(2e-4, rel=0.08)
    assert 0.02 < residual < 0.08


def test_latency_is_never_negative():
    transfer, residual = fit_transfer([(size, (size / 1e9) ** 1.2) for size in SIZES])  # as a cache would bend it
    assert transfer.latency_seconds == 0.0 and residual > 0.1


def test_a_transfer_without_speed_is_refused():
    with pytest.raises(ExecutionError, match="no speed"):
        fit_transfer([(1 << 20, 1e-3), (2 << 20, 1e-4)])


def test_linear_parameters_come_back():
    fit = fit_linear(synthetic(RATES), OVERHEADS, 2)
    assert fit.residual < 1e-3
    assert fit.rates.matmul_flops_per_second == pytest.approx(8e11, rel=0.01)
    assert fit.rates.weight_bytes_per_second == pytest.approx(3e10, rel=0.01)
    assert fit.rates.activation_bytes_per_second == pytest.approx(4e10, rel=0.03)
    assert fit.rates.half_width == pytest.approx(150, rel=0.03)
    assert fit.rates.sharpness == pytest.approx(3, rel=0.03)
    assert fit.rates.plain_weight_share == 1.0 and fit.overhead_factor == pytest.approx(1.5, rel=0.01)


def test_linear_parameters_from_noisy_readings():
    fit = fit_linear(synthetic(RATES, noise=0.05, seed=2, plain=(False, True)), OVERHEADS, 2)
    assert 0.03 < fit.residual < 0.07
    assert fit.rates.matmul_flops_per_second == pytest.approx(8e11, rel=0.06)
    assert fit.rates.weight_bytes_per_second == pytest.approx(3e10, rel=0.06)
    assert fit.rates.plain_weight_share == pytest.approx(0.6, rel=0.06)


def test_one_disturbed_reading_does_not_bend_the_curve():
    readings = synthetic(RATES)
    spoilt = readings[7]
    readings[7] = replace(spoilt, seconds=5 * spoilt.seconds)
    fit = fit_linear(readings, OVERHEADS, 2)
    assert fit.rates.matmul_flops_per_second == pytest.approx(8e11, rel=0.03)
    assert fit.rates.weight_bytes_per_second == pytest.approx(3e10, rel=0.03)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_what_is_predicted_fits_where_nothing_was_read(noise):
    fit = fit_linear(synthetic(RATES, noise, seed=3), OVERHEADS, 2)
    for hidden, rows in ((1024, 32), (1536, 128), (5120, 384)):
        for work in works(hidden).values():
            expected = RATES.linear_seconds(rows, work, 2)
            assert fit.rates.linear_seconds(rows, work, 2) == pytest.approx(expected, rel=0.01 + 1.5 * noise)
