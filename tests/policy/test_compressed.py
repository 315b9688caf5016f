"""Rates of products with compressed matrices, by the bits of weights and of activations."""

import pytest
from planned_models import planned

from flexrun.compress import WeightBits
from flexrun.errors import ConfigError
from flexrun.hardware import CompressedRates, LinearWork, Rates
from flexrun.policy.compressed import compressed_part, compressed_seconds

KNOWN = {
    "4": CompressedRates(1e13, 1e10, 1e10),
    "8": CompressedRates(1e13, 2e10, 2e10),
    "w4a8": CompressedRates(2e13, 4e10, 4e10),
}


def seconds(rows: int, bits: int, activation_bits: int) -> float:
    """Of the products alone."""
    spec = planned("llama")
    work = LinearWork.of(spec.linear_shapes("mlp", 0))
    parts = compressed_part(spec, WeightBits(bits), "mlp", 0, activation_bits)
    assert [part.bits for part in parts] == [bits]
    rates = Rates(1e12, 1e12, 1e30, 1e12, 1e12, compressed=KNOWN)
    return compressed_seconds(rates, rows, work, parts, spec.dtype_bytes, 0.0)


def test_rounded_activations_have_rates_of_their_own():
    assert seconds(1, 4, 16) == pytest.approx(4 * seconds(1, 4, 8), rel=0.1)
    assert seconds(4096, 4, 16) == pytest.approx(2 * seconds(4096, 4, 8), rel=0.1)


def test_where_none_are_known_those_of_the_dtype_s_activations_stand_in():
    assert seconds(7, 8, 8) == seconds(7, 8, 16)


def test_other_rates_are_refused():
    with pytest.raises(ConfigError, match="w8a4"):
        Rates(1e12, 1e12, 1e12, 1e12, 1e12, compressed={"w8a4": KNOWN["4"]})
