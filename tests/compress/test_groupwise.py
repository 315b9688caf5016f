"""Round trips of compressed matrices: every value within half a step of its group, whatever the group holds."""

import math

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun import native
from flexrun.compress.groupwise import LARGEST, GroupFormat, dequantise, quantise, split
from flexrun.errors import CheckpointError, ConfigError

FORMS = [
    GroupFormat(bits, group, symmetric) for bits in (4, 8) for group in (32, 64, 128) for symmetric in (False, True)
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def random(rows, columns, seed=0, scale=1.0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def steps_of(data, shape, form):
    """float64 [rows, columns]: the step of each value's group."""
    groups = form.group_count(shape[1])
    factors = split(data, shape, form)[1].flatten(0, 1)
    scales, done = [], 0
    while done < len(factors):
        tiles = min(4, len(factors) // groups - done // groups)
        panel = factors[done : done + tiles * groups].view(groups, tiles, *factors.shape[1:])
        scales.append(panel[:, :, 0].abs().double().permute(1, 2, 0).flatten(0, 1))
        done += tiles * groups
    return torch.cat(scales).repeat_interleave(form.group, 1)[: shape[0], : shape[1]]


def check_round_trip(matrix, form):
    shape = tuple(matrix.shape)
    data = quantise(matrix, form)
    assert data.dtype == torch.uint8 and len(data) == form.nbytes(shape)
    back = dequantise(data, shape, form, torch.float32)
    step = steps_of(data, shape, form)
    rounding = matrix.abs().double() * 2.0**-23 + 1e-45  # of float32 arithmetic
    assert back.isfinite().all()
    assert ((back.double() - matrix.double()).abs() <= step * (0.5 + 1e-4) + rounding).all()
    return back, step


@forms
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 64), (2, 200), (4, 576)], ids=str)
def test_every_value_comes_back_within_half_a_step(form, shape):
    matrix = random(*shape)
    _, step = check_round_trip(matrix, form)
    if not form.symmetric:
        span = float(matrix.max() - matrix.min())
        assert float(step.max()) <= span / form.levels * 1.02 + float(matrix.abs().max()) * 2.0**-10 / form.levels


@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-60000.0, max_value=60000.0),
        min_size=1,
        max_size=140,
    ),
    form=st.sampled_from(FORMS),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_numbers_come_back_within_half_a_step(values, form):
    check_round_trip(torch.tensor([values], dtype=torch.float32), form)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        *((form, 0.0) for form in FORMS),
        # a symmetric grid around zero need not hold another value
        *((form, value) for form in FORMS if not form.symmetric for value in (1.0, -0.375, 2.0**-14, -(2.0**15))),
    ],
    ids=str,
)
def test_constant_groups_of_a_float16_value_are_exact(form, value):
    matrix = torch.full((2, 130), value)
    back = dequantise(quantise(matrix, form), (2, 130), form, torch.float32)
    assert torch.equal(back, matrix)


@forms
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-6, 1e3, 1.9e4])
def test_tiny_and_huge_groups(form, scale):
    matrix = random(3, 100).clamp(-3, 3) * scale
    check_round_trip(matrix, form)


@forms
def test_the_largest_numbers_of_both_signs_in_one_group(form):
    check_round_trip(torch.tensor([[LARGEST, -LARGEST, 0.0, 1.0]]), form)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused_by_name(bad):
    matrix = random(4, 70)
    matrix[2, 69] = bad
    with pytest.raises(CheckpointError, match=r"layers\.3\.up holds NaN or infinite"):
        quantise(matrix, GroupFormat(), name="layers.3.up")


def test_weights_that_float16_does_not_hold_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"layers\.3\.up holds weights beyond 60000"):
        quantise(torch.tensor([[60001.0]]), GroupFormat(), name="layers.3.up")


def test_unknown_formats_are_refused():
    with pytest.raises(ConfigError, match="3 bits"):
        GroupFormat(3)
    with pytest.raises(ConfigError, match="groups of 48"):
        GroupFormat(4, 48)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout_is_the_documented_one(bits):
    form, rows, columns = GroupFormat(bits, 32), 83, 70  # a panel of four tiles, one of two
    matrix = random(rows, columns, seed=3)
    codes, factors = (part.flatten() for part in split(quantise(matrix, form), (rows, columns), form))
    together = 16 // bits  # columns of 32 bytes of a tile
    tile_bytes = 16 * 96 * bits // 8
    assert len(codes) == 6 * tile_bytes and len(factors) == 6 * 3 * 2 * 16
    for row, column in ((0, 0), (1, 31), (31, 32), (62, 63), (63, 69), (64, 5), (82, 69)):
        panel, tile, place = row // 64, row // 16 % 4, row % 16
        tiles = 2 if panel else 4
        run = column // together
        byte = int(codes[panel * 4 * tile_bytes + (run * tiles + tile) * 32 + 2 * place + column % 2])
        code = byte if bits == 8 else byte >> 4 if column % 4 > 1 else byte & 15
        first = panel * 4 * 3 * 2 * 16 + (column // 32 * tiles + tile) * 2 * 16 + place
        scale, minimum = float(factors[first]), float(factors[first + 16])
        assert scale * code + minimum == pytest.approx(float(matrix[row, column]), abs=scale / 2 * 1.001)
    used = -(-columns // together) * together
    assert not codes[4 * tile_bytes + used * 32 * 2 // together :].any()


@pytest.mark.parametrize(
    ("form", "bits"), [(GroupFormat(4), 4.5), (GroupFormat(8), 8.5), (GroupFormat(4, 64, True), 4.25)]
)
def test_bits_an_element(form, bits):
    assert form.nbytes((256, 1024)) * 8 == bits * 256 * 1024


@forms
def test_clipped_scales_never_have_a_larger_squared_error(form):
    matrix = random(16, 256, seed=5)
    matrix[:, ::61] *= 6  # outliers
    plain, clipped = (
        dequantise(quantise(matrix, form, clip=clip), (16, 256), form, torch.float32) for clip in (False, True)
    )
    errors = [(each - matrix).square().view(16, -1, form.group).sum(-1) for each in (plain, clipped)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    if form.bits == 4 and form.group > 32:
        assert float(errors[1].sum()) < 0.99 * float(errors[0].sum())


def test_a_matrix_in_pieces_is_that_in_one(monkeypatch):
    matrix, form = random(150, 96), GroupFormat(4, 32)
    whole = quantise(matrix, form)
    back = dequantise(whole, (150, 96), form, torch.bfloat16)
    monkeypatch.setattr("flexrun.compress.groupwise._BLOCK_ELEMENTS", 96 * 65)
    assert torch.equal(quantise(matrix, form), whole)
    assert torch.equal(dequantise(whole, (150, 96), form, torch.bfloat16), back)


def test_weights_on_a_grid_of_float16_factors_come_through_as_they_are():
    """As those of GGUF's Q4_1 do, whose groups have 32 weights and reach the ends of their range."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (20, 5, 32), generator=generator).float()
    codes[..., 0], codes[..., 7] = 0, 15
    scale = (torch.rand(20, 5, 1, generator=generator) * 0.01 + 1e-3).half().float()
    matrix = (codes * scale - (scale * 7.7).half().float()).flatten(1)
    form = GroupFormat(4, 32)
    assert torch.equal(dequantise(quantise(matrix, form), (20, 160), form, torch.float32), matrix)


# Weights that were rounded before ----------------------------------------------------------------------


def of_gguf(kind: str, scale: float) -> torch.Tensor:
    """float32 [40, 96] as a GGUF file of that kind has them."""
    kind = GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(random(40, 96, 3, scale).numpy(), kind), kind))


def of_mxfp4() -> torch.Tensor:
    """float32 [40, 96]: 4-bit floats, with a power of two for each 32."""
    draw = torch.Generator().manual_seed(4)
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes, signs = (torch.randint(0, most, (40, 96), generator=draw) for most in (8, 2))
    powers = torch.randint(-12, 4, (40, 3), generator=draw).repeat_interleave(32, 1)
    return numbers[codes] * (1 - 2 * signs) * torch.exp2(powers)


@pytest.mark.parametrize("scale", [1e-3, 0.02, 30.0])
@pytest.mark.parametrize(
    "kind, form",
    [
        ("Q4_0", GroupFormat(4, 32)),
        ("Q4_0", GroupFormat(4, 32, symmetric=True)),
        ("Q4_1", GroupFormat(4, 32)),
        ("Q4_0", GroupFormat(8, 32)),
        ("Q8_0", GroupFormat(8, 32)),
        ("Q8_0", GroupFormat(8, 32, symmetric=True)),
        ("MXFP4", GroupFormat(8, 32)),
        ("MXFP4", GroupFormat(8, 32, symmetric=True)),
    ],
    ids=str,
)
def test_weights_on_a_grid_that_a_group_can_hold_are_not_rounded_again(kind, form, scale):
    weights = of_mxfp4() if kind == "MXFP4" else of_gguf(kind, scale)
    data = quantise(weights, form)
    assert torch.equal(dequantise(data, tuple(weights.shape), form, torch.float32), weights)
    out = torch.empty(weights.shape)
    if native.dequantise(*split(data, tuple(weights.shape), form), form.bits, form.group, out):
        assert torch.equal(out, weights)


def test_weights_beside_a_grid_are_rounded_to_the_nearest():
    """One weight off the grid, and its group takes the range as any other; the rest of the row keeps the grid."""
    form, weights = GroupFormat(4, 32), of_gguf("Q4_0", 0.02)
    changed = weights.clone()
    changed[0, 5] *= 1.01
    back = dequantise(quantise(changed, form), (40, 96), form, torch.float32)
    assert torch.equal(back[0, 32:], weights[0, 32:]) and torch.equal(back[1:], weights[1:])
    step = (changed[0, :32].max() - changed[0, :32].min()) / 15
    assert (back[0, :32] - changed[0, :32]).abs().max() < 0.51 * step
