"""Activations rounded to 8 bits, and products with them where no kernel does them."""

import pytest
import torch

from flexrun import native
from flexrun.compress import GroupFormat, GroupwiseMatrix, quantise
from flexrun.compress.matrix import round_activations


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("columns", [1, 32, 300])
def test_each_activation_comes_back_within_half_a_step_of_its_group(group, columns):
    x = random(9, columns)
    x[1] = 0
    back = round_activations(x, group)
    for start in range(0, columns, group):
        own = x[:, start : start + group]
        largest = own.abs().amax(1, keepdim=True)
        assert ((back[:, start : start + group] - own).abs() <= largest / 254 * (1 + 1e-5)).all()
    assert not back[1].any()


def test_a_large_activation_costs_its_own_group_alone():
    x = random(1, 128)
    x[0, 5] = 1000
    back = round_activations(x, 64)
    assert (back[0, :64] - x[0, :64]).abs().max() > 0.3
    assert (back[0, 64:] - x[0, 64:]).abs().max() < 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_spoils_its_group(value):
    x = random(2, 64)
    x[0, 3] = value
    back = round_activations(x, 32)
    assert back[0, :32].isnan().any() and back[0, 32:].isfinite().all() and back[1].isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_without_kernels_a_matrix_multiplies_by_the_same_numbers(bits, monkeypatch):
    form, shape = GroupFormat(bits, 64), (70, 300)
    matrix = GroupwiseMatrix(quantise(random(*shape), form), shape, form, torch.float32, activation_bits=8)
    assert matrix.multiplies_codes
    x = random(5, 300, seed=1)
    expected = round_activations(x, 64) @ matrix.dequantised().t()
    torch.testing.assert_close(matrix.multiply(x), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(native, "available", False)
    assert matrix.multiplies_codes
    torch.testing.assert_close(matrix.multiply(x), expected, rtol=1e-4, atol=1e-4)
