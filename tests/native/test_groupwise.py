"""Compressed matrices by the kernels: the weights of torch's form bit for bit, products within rounding of float64."""

from pathlib import Path

import pytest
import torch

from flexrun import native
from flexrun.compress.groupwise import GroupFormat, dequantise, quantise, split
from flexrun.compress.matrix import round_activations

FORMS = [
    GroupFormat(4, 32),
    GroupFormat(4, 64),
    GroupFormat(4, 128, True),
    GroupFormat(8, 64),
    GroupFormat(8, 32, True),
]
SHAPES = [(1, 1), (16, 64), (70, 70), (130, 300), (64, 576)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

forms = pytest.mark.parametrize("form", FORMS, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
x_bits = pytest.mark.parametrize("x_bits", [16, 8])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@forms
@shapes
def test_weights_are_those_of_the_torch_form(instruction_set, dtype, form, shape):
    data = quantise(random(*shape), form)
    out = torch.empty(shape, dtype=dtype)
    assert native.dequantise(*split(data, shape, form), form.bits, form.group, out)
    assert torch.equal(out, dequantise(data, shape, form, dtype))


@forms
@shapes
@x_bits
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13])
def test_products(instruction_set, dtype, form, shape, rows, x_bits):
    data = quantise(random(*shape), form)
    x, bias = random(rows, shape[1], seed=1).to(dtype), random(shape[0], seed=2).to(dtype)
    wide = torch.full((rows, shape[0] + 5), 7.0, dtype=dtype)
    out = wide[:, 2 : shape[0] + 2]
    assert native.multiply(x, *split(data, shape, form), form.bits, form.group, bias, out, x_bits)
    weights = dequantise(data, shape, form, torch.float32).double()
    used = (x.float() if x_bits == 16 else round_activations(x.float(), form.group)).double()
    expected = used @ weights.t() + bias.double()
    # errors grow with what was added up: of whole numbers, codes and their minimum
    size = used.abs() @ (weights.abs() + (2 * weights.abs().max() if x_bits == 8 else 0)).t() + bias.double().abs()
    error = (out.double() - expected).abs()
    assert (error <= TOLERANCE[dtype] * expected.abs() + 2e-6 * size).all()
    assert (wide[:, :2] == 7).all() and (wide[:, shape[0] + 2 :] == 7).all()


@x_bits
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_the_others_nor_on_threads(instruction_set, dtype, bits, threads, x_bits):
    form, shape = GroupFormat(bits, 64), (200, 320)
    parts = split(quantise(random(*shape), form), shape, form)
    x = random(201, 320, seed=1).to(dtype)  # more than are multiplied at once
    whole, alone = torch.empty(201, 200, dtype=dtype), torch.empty(1, 200, dtype=dtype)
    assert native.multiply(x, *parts, bits, 64, None, whole, x_bits)
    torch.set_num_threads(1)
    for row in (0, 5, 7, 191, 192, 200):
        assert native.multiply(x[row : row + 1], *parts, bits, 64, None, alone, x_bits)
        assert torch.equal(alone[0], whole[row])


@x_bits
def test_strided_rows_of_x(instruction_set, dtype, x_bits):
    form, shape = GroupFormat(4, 32), (48, 96)
    parts = split(quantise(random(*shape), form), shape, form)
    wide = random(9, 200, seed=1).to(dtype)
    strided, plain = torch.empty(9, 48, dtype=dtype), torch.empty(9, 48, dtype=dtype)
    assert native.multiply(wide[:, 50:146], *parts, 4, 32, None, strided, x_bits)
    assert native.multiply(wide[:, 50:146].contiguous(), *parts, 4, 32, None, plain, x_bits)
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_are_hard_to_round(instruction_set, bits):
    """Zeros, numbers whose scale has no inverse, large ones beside small ones; and NaN and infinity spoil their row."""
    form, shape = GroupFormat(bits, 32), (70, 96)
    data = quantise(random(*shape), form)
    x = random(7, 96, seed=1)
    x[0], x[1], x[2, ::32], x[3] = 0, 1e-39, 3e4, x[3] * 1e-20
    x[4, 40], x[5, 95], x[6, 0] = float("nan"), float("inf"), -float("inf")
    out = torch.empty(7, 70)
    assert native.multiply(x, *split(data, shape, form), bits, 32, None, out, 8)
    assert not out[:2].any() and not out[4:].isfinite().any()
    weights = dequantise(data, shape, form, torch.float32).double()
    rounded = round_activations(x, 32)[2:4].double()
    size = rounded.abs() @ (weights.abs() + 2 * weights.abs().max()).t()
    assert ((out[2:4].double() - rounded @ weights.t()).abs() <= 2e-6 * size).all()


def test_what_the_kernels_do_not_take_is_left_to_torch(instruction_set):
    form, shape = GroupFormat(4, 32), (16, 32)
    parts = split(quantise(random(*shape), form), shape, form)
    x, out = random(2, 32), torch.empty(2, 16)
    assert not native.multiply(x.double(), *parts, 4, 32, None, out.double())
    assert not native.multiply(x, *parts, 4, 32, None, out.bfloat16())
    assert not native.multiply(x, *parts, 4, 32, torch.zeros(16).bfloat16(), out)
    assert not native.dequantise(*parts, 4, 32, torch.empty(32, 32)[:, :16])


def test_forecasts_count_the_blocks_of_rows_that_the_kernels_take():
    source = Path(native.__file__).with_name("groupwise.c").read_text()
    assert f"#define MOST_INPUTS {native.ROWS_AT_ONCE} " in source
