"""Each operation against its formula in float64, in place and out of place, strided and not."""

from __future__ import annotations

import pytest
import torch

from flexrun.models import ops


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def close(actual: torch.Tensor, exact: torch.Tensor):
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[actual.dtype]
    torch.testing.assert_close(actual.double(), exact, atol=tolerance, rtol=tolerance)


def exact_rms(x, weight, eps, offset):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype, offset):
    x, weight = normal(5, 3, 14, dtype=dtype), normal(14, dtype=dtype, seed=1)
    exact = exact_rms(x, weight, 1e-5, offset)
    close(ops.rms_norm(x, weight, 1e-5, offset), exact)
    strided = torch.zeros(5, 4, 14, dtype=dtype)[:, :3]
    strided.copy_(x)
    assert ops.rms_norm(strided, weight, 1e-5, offset, out=strided) is strided
    close(strided, exact)


def test_rms_norm_of_large_half_precision_values_does_not_overflow():
    x = torch.full((1, 8), 3e4, dtype=torch.float16)
    close(ops.rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones(1, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_norms_update_the_hidden_state(dtype):
    hidden, branch, weight, bias = (normal(4, 10, dtype=dtype, seed=seed) for seed in range(4))
    weight, bias = weight[0], bias[0]
    total = (hidden.double() + 0.5 * branch.double()).to(dtype)
    first, second = hidden.clone(), hidden.clone()
    close(ops.add_rms_norm(first, branch, weight, 1e-6, 1.0, 0.5), exact_rms(total, weight, 1e-6, 1.0))
    normed = ops.add_layer_norm(second, branch, weight, bias, 1e-6, 0.5)
    close(normed, torch.nn.functional.layer_norm(total.double(), (10,), weight.double(), bias.double(), 1e-6))
    close(first, total.double())
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(kind):
    def exact(x):
        x = x.double()
        if kind == "silu":
            return x / (1 + torch.exp(-x))
        if kind == "gelu":
            return x * 0.5 * (1 + torch.erf(x / 2**0.5))
        if kind == "gelu_tanh":
            return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        return x.clamp(min=0)

    x = normal(6, 26)
    gate, up = x[:, :13], x[:, 13:]
    expected = exact(gate) * up.double()
    out = torch.empty(6, 13)
    close(ops.gated_activation(x.clone(), kind), expected)
    assert ops.gated_activation(x.clone(), kind, out) is out
    close(out, expected)
    alone = x.clone()
    assert ops.activation(alone, kind) is alone
    close(alone, exact(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [None, normal(7, seed=2)])
def test_linear(bias, dtype):
    x, weight = normal(5, 11, dtype=dtype), normal(7, 11, seed=1, dtype=dtype)
    bias = None if bias is None else bias.to(dtype)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    close(ops.linear(x, weight, bias), expected)
    close(ops.linear(x, weight, bias, torch.empty(5, 7, dtype=dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_multiplies_any_number_of_rows(dtype):
    if not ops.can_pack(dtype):
        pytest.skip(f"this CPU packs no {dtype} matrices")
    weight = normal(131, 100, dtype=dtype, seed=1) / 8
    packed, x = ops.pack_matrix(weight.clone()), normal(70, 100, dtype=dtype)
    expected = x.double() @ weight.double().T
    for rows in (0, 1, 2, 3, 16, 70):
        close(ops.linear(x[:rows], packed), expected[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_turns_pairs_and_passes_the_rest(dtype):
    angles = normal(5, 3, seed=1)
    buffer = normal(5, 4, 8, dtype=dtype)
    x = buffer[:, :2]  # the heads that rotate, strided as inside a fused qkv
    before = buffer.clone()
    pairs = torch.complex(before[:, :2, :3].double(), before[:, :2, 3:6].double())
    turned = pairs * torch.polar(torch.ones(5, 1, 3).double(), angles.double().unsqueeze(1))
    assert ops.apply_rope(x, angles.cos(), angles.sin()) is x
    close(x[..., :3], turned.real)
    close(x[..., 3:6], turned.imag)
    assert torch.equal(buffer[:, :2, 6:], before[:, :2, 6:])
    assert torch.equal(buffer[:, 2:], before[:, 2:])


def test_soft_cap_bounds():
    x = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4])
    close(ops.soft_cap(x.clone(), 30.0), 30 * torch.tanh(x.double() / 30))
