"""The rate at which codes become weights is what a product takes beyond reading its bytes and multiplying."""

import pytest

from flexrun.hardware import profile_compressed
from flexrun.hardware.effort import MIDDLE, Bench
from flexrun.hardware.rates import LinearWork, Rates
from flexrun.hardware.timing import Reading

RATES = Rates(4e11, 2e10, 1e10, 3e10, 2e11)
SHAPE = (MIDDLE.intermediate_size // 2, MIDDLE.hidden_size)
ELEMENTS = SHAPE[0] * SHAPE[1]


def measured(monkeypatch, effort, seconds: float) -> float:
    def read_all(self, calls, **settings):
        assert calls[0]().shape == (profile_compressed.ROWS, SHAPE[0])
        return [Reading(seconds, 0.0)]

    monkeypatch.setattr(Bench, "read_all", read_all)
    return profile_compressed.dequantise_bytes_per_second(Bench(effort), "bfloat16", RATES)


def test_what_the_bytes_explain_is_taken_off(monkeypatch, tiny_effort):
    work = LinearWork.of([SHAPE[::-1]])
    explained = RATES.linear_seconds(profile_compressed.ROWS, work, 2, profile_compressed.FORM.nbytes(SHAPE))
    rate = measured(monkeypatch, tiny_effort, explained + 1e-3)
    assert rate == pytest.approx(ELEMENTS * 2 / 1e-3)


def test_a_product_faster_than_its_bytes_leaves_a_finite_rate(monkeypatch, tiny_effort):
    assert measured(monkeypatch, tiny_effort, 1e-5) == pytest.approx(ELEMENTS * 2 / 5e-7)
