"""Norm, gate and rope kernels against float64 formulas over odd widths, strides, threads and instruction sets."""

import pytest
import torch
import torch.nn.functional as F

from flexrun import native

WIDTHS = [1, 16, 33, 1001]


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected_norm(hidden, weight, eps, offset):
    wide = hidden.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(instruction_set, dtype, tolerance, width, offset):
    hidden, weight = random(5, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    out = torch.empty_like(hidden)
    assert native.rms_norm(hidden, weight, 1e-5, offset, out)
    torch.testing.assert_close(out.double(), expected_norm(hidden, weight, 1e-5, offset), **tolerance)


def test_rms_norm_without_weight_in_place(instruction_set, dtype, tolerance):
    hidden = random(3, 50, dtype=dtype)
    expected = expected_norm(hidden, torch.ones(50), 1e-6, 0.0)
    assert native.rms_norm(hidden, None, 1e-6, 0.0, hidden)
    torch.testing.assert_close(hidden.double(), expected, **tolerance)


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_normalises_the_rounded_sum(instruction_set, dtype, tolerance, width):
    hidden, branch = random(40, width, dtype=dtype), random(40, 2 * width, dtype=dtype, seed=2)[:, width:]
    weight, out = random(width, dtype=dtype, seed=1), torch.empty_like(hidden)
    total = (hidden.float() + 0.25 * branch.float()).to(dtype)
    assert native.rms_norm(hidden, weight, 1e-5, 0.0, out, branch=branch, scale=0.25)
    torch.testing.assert_close(hidden, total, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-7)
    torch.testing.assert_close(out.double(), expected_norm(hidden, weight, 1e-5, 0.0), **tolerance)


def test_rms_norm_of_heads_inside_a_fused_buffer(instruction_set, dtype, tolerance):
    fused = random(6, 9, 24, dtype=dtype)
    before = fused.clone()
    weight = random(24, dtype=dtype, seed=1)
    heads = fused[:, 2:7]
    assert native.rms_norm(heads, weight, 1e-6, 0.0, heads)
    torch.testing.assert_close(heads.double(), expected_norm(before[:, 2:7], weight, 1e-6, 0.0), **tolerance)
    assert torch.equal(fused[:, :2], before[:, :2]) and torch.equal(fused[:, 7:], before[:, 7:])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_activation(instruction_set, dtype, tolerance, width, kind):
    gate_up = random(20, 2 * width + 5, dtype=dtype).mul_(4)[:, : 2 * width]
    gate, up = gate_up.double().chunk(2, -1)
    activated = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")
    out = torch.full((20, width + 3), 7.0, dtype=dtype)
    assert native.gated_activation(gate_up, kind, out[:, :width])
    atol = tolerance["atol"] * (1 if dtype == torch.float32 else 8)  # two roundings of values up to about 100
    torch.testing.assert_close(out[:, :width].double(), activated * up, rtol=2 * tolerance["rtol"], atol=atol)
    assert (out[:, width:] == 7.0).all()


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_activations_at_the_extremes(instruction_set, kind):
    gate = torch.tensor([-1e4, -100.0, -88.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 88.0, 100.0, 1e4])
    out = torch.empty(1, len(gate))
    assert native.gated_activation(torch.cat([gate, torch.ones(len(gate))])[None], kind, out)
    wide = gate.double()
    expected = F.silu(wide) if kind == "silu" else F.gelu(wide, approximate="tanh")
    torch.testing.assert_close(out[0].double(), expected, rtol=2e-6, atol=1e-30 if kind == "silu" else 1e-12)


@pytest.mark.parametrize("half", [1, 8, 12, 32, 37])
@pytest.mark.parametrize("rest", [0, 6])
def test_rope_rotates_in_place_and_passes_the_rest(instruction_set, dtype, tolerance, half, rest):
    fused = random(30, 7, 2 * half + rest, dtype=dtype)
    angle = random(30, half, dtype=torch.float32, seed=3).mul_(9)
    before, heads = fused.clone(), fused[:, 1:5]
    assert native.apply_rope(heads, angle.cos(), angle.sin())
    low, high = before[:, 1:5, :half].double(), before[:, 1:5, half : 2 * half].double()
    cosine, sine = angle.cos().double()[:, None], angle.sin().double()[:, None]
    rotated = torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)
    torch.testing.assert_close(heads[..., : 2 * half].double(), rotated, **tolerance)
    assert torch.equal(heads[..., 2 * half :], before[:, 1:5, 2 * half :])
    assert torch.equal(fused[:, 5:], before[:, 5:]) and torch.equal(fused[:, :1], before[:, :1])


def test_threads_do_not_change_a_bit(instruction_set, threads, dtype):
    hidden, branch, weight = (random(50, 1000, dtype=dtype, seed=seed) for seed in range(3))
    heads, angle = random(50, 40, 40, dtype=dtype), random(50, 20, dtype=torch.float32)

    def run():
        norm, gated, rotated, total = (
            torch.empty_like(hidden),
            hidden.new_empty(50, 500),
            heads.clone(),
            hidden.clone(),
        )
        assert native.rms_norm(total, weight[0], 1e-5, 0.0, norm, branch=branch)
        assert native.gated_activation(hidden, "silu", gated)
        assert native.apply_rope(rotated, angle.cos(), angle.sin())
        return total, norm, gated, rotated

    threaded = run()
    torch.set_num_threads(1)
    assert all(torch.equal(one, many) for one, many in zip(run(), threaded))


def test_half_precision_rounds_to_nearest_even(instruction_set):
    """Sums that torch rounds must round the same way, subnormal and overflowing halves included."""
    for dtype in (torch.bfloat16, torch.float16):
        tiny = torch.finfo(dtype).tiny
        value = torch.cat([torch.linspace(-3, 3, 301), torch.tensor([tiny, tiny / 4, 1e-7, 6e4, -6e4])]).to(dtype)[None]
        branch = random(1, value.shape[1], dtype=dtype, seed=4) * value
        hidden = value.clone()
        assert native.rms_norm(hidden, None, 1e-5, 0.0, torch.empty_like(value), branch=branch)
        assert torch.equal(hidden, (value.float() + branch.float()).to(dtype))


def test_not_applicable_is_false(instruction_set):
    gate_up, out = torch.zeros(2, 8), torch.zeros(2, 4)
    assert native.gated_activation(gate_up, "silu", out)
    assert not native.gated_activation(gate_up, "gelu", out)
    assert not native.gated_activation(gate_up.double(), "silu", out.double())
    assert not native.gated_activation(gate_up, "silu", out.bfloat16())
    assert not native.gated_activation(gate_up.t().contiguous().t(), "silu", out)
    assert not native.rms_norm(gate_up, torch.ones(8).bfloat16(), 1e-5, 0.0, torch.zeros(2, 8))
    assert not native.rms_norm(gate_up, torch.ones(8), 1e-5, 0.0, torch.zeros(3, 8))
    heads = torch.zeros(2, 1, 8)
    assert not native.apply_rope(heads, torch.zeros(2, 5), torch.zeros(2, 5))
    assert not native.apply_rope(heads, torch.zeros(2, 4).double(), torch.zeros(2, 4).double())
