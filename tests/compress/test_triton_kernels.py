"""The GPU's kernel gives the values of torch's form; by Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
pytest.importorskip("triton", reason="triton is not installed")

from flexrun.compress.groupwise import GroupFormat, dequantise, quantise
from flexrun.compress.matrix import GroupwiseMatrix
from flexrun.compress.triton_kernels import dequantise as by_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = [GroupFormat(bits, group, symmetric) for bits in (4, 8) for group in (32, 128) for symmetric in (False, True)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (64, 128), (100, 200), (150, 130)])
def test_values_are_those_of_torch(form, shape):
    """To the bit: panels of four tiles and of fewer, rows, columns and groups that end within them."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    data = quantise(matrix, form).to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
        by_triton(data, shape, form, out)
        expected = dequantise(data, shape, form, dtype)
        if dtype is torch.bfloat16 and DEVICE == "cpu":  # which the interpreter cuts off, where a GPU rounds
            expected = (dequantise(data, shape, form, torch.float32).view(torch.int32) & -65536).view(torch.float32)
        assert torch.equal(out, expected.to(dtype))


def test_rows_from_a_panel_on():
    form, shape = GroupFormat(4, 64), (200, 96)
    data = quantise(torch.randn(shape), form).to(DEVICE)
    whole = dequantise(data, shape, form, torch.float16)
    for rows in (slice(0, 64), slice(64, 192), slice(128, 200)):
        out = torch.zeros(rows.stop - rows.start, shape[1], dtype=torch.float16, device=DEVICE)
        by_triton(data, shape, form, out, rows)
        assert torch.equal(out, whole[rows])
    with pytest.raises(ValueError, match="rows from 16"):
        by_triton(data, shape, form, out, slice(16, 80))


def test_products_go_part_by_part_through_the_kernel(monkeypatch):
    """As on a GPU: a matrix larger than the scratch memory, and the torch form where the kernel cannot be had."""
    form, shape = GroupFormat(4, 32), (300, 64)
    matrix = GroupwiseMatrix(quantise(torch.randn(shape), form).to(DEVICE), shape, form, torch.float32)
    x, bias = torch.randn(5, 64, device=DEVICE), torch.randn(300, device=DEVICE)
    expected = x @ matrix.dequantised().T + bias
    launched = []

    def launch(*arguments):
        launched.append(arguments[-1])
        by_triton(*arguments)

    monkeypatch.setattr("flexrun.native.multiply", lambda *_: False)
    monkeypatch.setattr("flexrun.compress.matrix.DEQUANTISE_BYTES", 128 * 64 * 4)
    for kernel, parts in ((launch, 3), (None, 0)):
        monkeypatch.setattr("flexrun.compress.matrix._gpu_kernel", lambda _, kernel=kernel: kernel)
        launched.clear()
        torch.testing.assert_close(matrix.multiply(x, bias), expected)
        assert len(launched) == parts


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_a_matrix_on_the_gpu_is_multiplied_through_the_kernel():
    form, shape = GroupFormat(4, 64), (5000, 2048)
    data = quantise(torch.randn(shape) * 0.02, form).to(DEVICE)
    x = torch.randn(7, shape[1], device=DEVICE).bfloat16()
    matrix = GroupwiseMatrix(data, shape, form, torch.bfloat16)
    expected = x @ dequantise(data, shape, form, torch.bfloat16).T
    torch.testing.assert_close(matrix.multiply(x), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(matrix.dequantised(), dequantise(data, shape, form, torch.bfloat16))
