"""The kernel for long segments against float64: tails, windows, caps, strides, threads."""

from __future__ import annotations

import numpy
import pytest
import torch
from attention_oracle import oracle

from flexrun import native
from flexrun.attention import Segments


@pytest.fixture(autouse=True)
def bfloat16_products():
    if not native.select("avx512_bf16"):
        pytest.skip("the prefill kernel needs the native library and a CPU with AVX512-bf16")
    yield
    native.select(None)


def inputs(heads: int, kv_heads: int, head_dim: int, tokens: int, capacity: int):
    generator = torch.Generator().manual_seed(heads * 1000 + head_dim + tokens)
    shapes = ((tokens, heads, head_dim), (capacity, kv_heads, head_dim), (capacity, kv_heads, head_dim))
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def run(query, keys, values, rows, scale, window=0, softcap=0.0, sinks=None, out=None, lse=None) -> torch.Tensor:
    out = torch.zeros_like(query) if out is None else out
    segments = Segments(*numpy.array(rows).T)
    assert native.attend(
        query, keys, values, out, segments.pointer, len(rows), scale, window, softcap, long=True, lse=lse, sinks=sinks
    )
    return out


def check(heads, kv_heads, head_dim, rows, **options) -> None:
    tokens, capacity = (max(row[n] + row[n + 1] for row in rows) for n in (0, 2))
    query, keys, values = inputs(heads, kv_heads, head_dim, tokens, capacity)
    lse = torch.full((tokens, heads), float("nan"))
    got = run(query, keys, values, rows, head_dim**-0.5, lse=lse, **options)
    segments = Segments(*numpy.array(rows).T)
    expected, expected_lse = oracle(query, keys, values, segments, scale=head_dim**-0.5, **options)
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128, 256])
def test_head_dims(head_dim):
    check(6, 2, head_dim, [(0, 70, 0, 130)])


@pytest.mark.parametrize("query_len", [1, 5, 6, 7, 63, 64, 65, 130])
@pytest.mark.parametrize("cached", [0, 1, 63, 64, 200])
def test_every_kind_of_tail(query_len, cached):
    check(3, 1, 32, [(0, query_len, 3, cached + query_len)])


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (8, 1), (14, 2)], ids=str)
def test_groups(heads):
    check(*heads, 64, [(0, 90, 0, 90), (90, 20, 100, 75)])


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 64}, {"window": 100}, {"softcap": 3.0}], ids=str)
def test_windows_and_soft_caps(options):
    check(4, 2, 64, [(0, 150, 0, 300), (150, 80, 300, 80)], **options)


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 3.0}], ids=str)
def test_sinks(options):
    rows = [(0, 150, 0, 300), (150, 80, 300, 80), (230, 70, 10, 3, -5)]
    rows = [(*row, row[3] - row[1])[:5] for row in rows]
    check(4, 2, 64, rows, sinks=torch.tensor([-100.0, 0.0, 2.0, 100.0]), **options)


def test_large_scores_do_not_overflow():
    query, keys, values = inputs(2, 1, 64, 40, 40)
    got = run(query * 100, keys * 100, values, [(0, 40, 0, 40)], 1.0)
    assert got.isfinite().all()


def test_strided_query_and_slab_views():
    fused = torch.randn(100, 8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    slab = torch.randn(2, 150, 2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    query, rows = fused[:, :4], [(0, 100, 20, 120)]
    got = run(query, slab[0], slab[1], rows, 0.125, out=torch.zeros(100, 4, 64, dtype=torch.bfloat16))
    expected, _ = oracle(query, slab[0], slab[1], Segments(*numpy.array(rows).T), scale=0.125)
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("options", [{}, {"window": 30}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("position", [-200, -70, -33, -1, 0, 20, 99, 100, 130, 1000])
def test_a_part_of_the_kv(position, options):
    check(4, 2, 64, [(0, 90, 0, 100, position), (90, 70, 100, 0, 12), (160, 70, 101, 3, 0)], **options)


def test_neither_threads_nor_company_change_a_bit():
    query, keys, values = inputs(6, 2, 64, 400, 500)
    rows = [(0, 130, 0, 130), (130, 200, 130, 260), (330, 70, 390, 70)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [run(query, keys, values, [row], 0.125) for row in rows]
        torch.set_num_threads(2)
        together = run(query, keys, values, rows, 0.125)
    finally:
        torch.set_num_threads(before)
    for (start, count, _, _), single in zip(rows, alone):
        assert torch.equal(single[start : start + count], together[start : start + count])


def test_other_dtypes_are_left_to_the_caller():
    query, keys, values = (tensor.float() for tensor in inputs(2, 1, 64, 20, 20))
    segments = Segments(*numpy.array([(0, 20, 0, 20)]).T)
    assert not native.attend(
        query, keys, values, torch.zeros_like(query), segments.pointer, 1, 0.125, 0, 0.0, long=True
    )
