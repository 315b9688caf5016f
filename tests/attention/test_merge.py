"""KV split by token: two parts merged by log-sum-exp are the whole, in float64 and at every edge."""

import math

import numpy
import pytest
import torch
from attention_oracle import make, oracle

from flexrun import native
from flexrun.attention import KVPart, Segments, attend, attend_split, merge

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}  # the parts are rounded too
QUERY_LENS, KV_LENS = [1, 3, 1, 12, 20, 1], [40, 33, 1, 70, 20, 300]


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def path(request, monkeypatch):
    if request.param and not native.available:
        pytest.skip("the native library is not built")
    monkeypatch.setattr(native, "available", request.param)


def split_slab(keys, values, segments, first_tokens):
    """The parts in slabs of their own: what does not belong to a part is NaN there."""
    second_start = numpy.cumsum([5, *(segments.kv_len[:-1] + 2)])
    first, second = segments.split_kv(first_tokens, second_start)
    parts = []
    for half, skipped in ((first, 0 * first.kv_len), (second, first.kv_len)):
        slab = torch.full((2, half.kv_end + 4, *keys.shape[1:]), float("nan"), dtype=keys.dtype)
        for (_, _, start, count), source in zip(half.rows, (segments.kv_start + skipped).tolist()):
            slab[0, start : start + count] = keys[source : source + count]
            slab[1, start : start + count] = values[source : source + count]
        parts.append(KVPart(slab[0], slab[1], half))
    return parts


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 1}, {"window": 25}, {"softcap": 2.0}, {"window": 35, "softcap": 3.0}, {"sinks": 1.5}],
    ids=str,
)
@pytest.mark.parametrize("first_tokens", [0, 1, 30, 1000, [7, 33, 0, 69, 10, 280]], ids=str)
def test_two_parts_are_the_whole(path, dtype, heads, options, first_tokens):
    num_heads, num_kv_heads = heads
    query, keys, values, segments = make(
        QUERY_LENS, KV_LENS, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=32, dtype=dtype
    )
    if "sinks" in options:
        options = {"sinks": torch.linspace(-options["sinks"], options["sinks"], num_heads)}
    expected, expected_lse = oracle(query, keys, values, segments, scale=0.3, **options)
    first, second = split_slab(keys, values, segments, first_tokens)
    out, lse = torch.full(query.shape, float("nan"), dtype=dtype), torch.full(query.shape[:2], float("nan"))
    assert attend_split(query, first, second, scale=0.3, out=out, lse=lse, **options) is out
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("cuts", [(20,), (0, 5, 5, 40), (1, 2, 3, 4)], ids=str)
def test_many_parts_are_the_whole(path, cuts):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
    query, keys, values, segments = make([1, 9], [80, 60], **sizes)
    expected, expected_lse = oracle(query, keys, values, segments, scale=0.4)
    out, lse = torch.zeros(query.shape), torch.full(query.shape[:2], float("-inf"))
    rest, taken = segments, 0
    for cut in (*cuts, 1000):
        part, rest = rest.split_kv(cut - taken)
        taken = cut
        part_out, part_lse = torch.empty(query.shape), torch.empty(query.shape[:2])
        attend(query, keys, values, part, scale=0.4, out=part_out, lse=part_lse)
        merge(out, lse, part_out, part_lse, out, lse)
    assert rest.kv_len.max() == 0
    torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=3e-6, atol=3e-6)


def test_a_part_that_sees_nothing_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(3, 2, 8, generator=generator).bfloat16()
    lse = torch.tensor([[1.0, -200.0], [0.0, 300.0], [-math.inf, 5.0]])
    out[2, 0] = 0
    nothing, never = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for parts in ((out, lse, nothing, never), (nothing, never, out, lse)):
        merged, total = torch.empty_like(out), torch.empty_like(lse)
        merge(*parts, merged, total)
        assert torch.equal(merged, out) and torch.equal(total, lse)


def test_rows_of_neither_part_are_zero_whatever_lies_there():
    garbage, never = torch.full((1, 1, 4), float("nan")), torch.full((1, 1), -math.inf)
    assert torch.equal(merge(garbage, never, garbage, never, torch.empty(1, 1, 4)), torch.zeros(1, 1, 4))


def test_scores_far_apart_do_not_overflow():
    ones = torch.ones(1, 2, 4)
    far = torch.tensor([[1e4, -1e4]])
    merged, total = torch.empty(1, 2, 4), torch.empty(1, 2)
    merge(ones, far, 3 * ones, -far, merged, total)
    assert torch.equal(merged, torch.tensor([1.0, 3.0]).view(1, 2, 1) * ones)
    assert torch.equal(total, far.abs())


def test_merged_in_place():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 5, 3, 8, generator=generator)
    lse_a, lse_b = torch.randn(2, 5, 3, generator=generator)
    expected, expected_lse = torch.empty_like(a), torch.empty_like(lse_a)
    merge(a, lse_a, b, lse_b, expected, expected_lse)
    merge(a, lse_a, b, lse_b, b, lse_b)
    assert torch.equal(b, expected) and torch.equal(lse_b, expected_lse)


def test_split_keeps_queries_and_positions():
    first, second = Segments([0, 1], [1, 4], [10, 50], [8, 6]).split_kv([5, 9])
    assert first.rows == [(0, 1, 10, 5), (1, 4, 50, 6)] and first.query_position.tolist() == [7, 2]
    assert second.rows == [(0, 1, 15, 3), (1, 4, 56, 0)] and second.query_position.tolist() == [2, -4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 25}, {"softcap": 2.0}], ids=str)
def test_one_part_on_the_gpu_and_one_in_ram(dtype, options):
    query, keys, values, segments = make(QUERY_LENS, KV_LENS, num_heads=8, num_kv_heads=2, head_dim=64, dtype=dtype)
    expected, expected_lse = oracle(query, keys, values, segments, scale=0.125, **options)
    first, second = split_slab(keys, values, segments, [7, 33, 0, 69, 10, 280])
    first = KVPart(first.keys.cuda(), first.values.cuda(), first.segments)
    out, lse = torch.empty_like(query, device="cuda"), torch.empty(query.shape[:2], device="cuda")
    attend_split(query.cuda(), first, second, scale=0.125, out=out, lse=lse, **options)
    tolerance = {"rtol": 10 * TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}  # TF32 is off, sums are in other orders
    torch.testing.assert_close(out.cpu().double(), expected, **tolerance)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-4, atol=1e-4)
