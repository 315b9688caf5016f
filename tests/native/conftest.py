"""Every kernel test runs once for each instruction set that this CPU has."""

import pytest
import torch

from flexrun import native

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"])
def instruction_set(request):
    if not native.available:
        pytest.skip("the native library is not built")
    if not native.select(request.param):
        pytest.skip(f"this CPU lacks {request.param}")
    yield request.param
    native.select(None)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[2, 3], ids=lambda count: f"threads{count}")
def threads(request, one_thread):
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture(params=list(TOLERANCE), ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def tolerance(dtype):
    return {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
