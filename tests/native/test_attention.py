"""The decode attention kernel against float64 over shapes, strides, threads and instruction sets."""

import numpy
import pytest
import torch

from flexrun import native
from flexrun.attention import Segments


def oracle(query, keys, values, segments, scale, window, softcap):
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    keys, values = (slab.double().repeat_interleave(group, dim=1) for slab in (keys, values))
    for query_start, query_len, kv_start, kv_len in segments.rows:
        position = torch.arange(kv_len - query_len, kv_len)[:, None]
        column = torch.arange(kv_len)
        seen = column <= position
        if window:
            seen &= column > position - window
        rows, kv_rows = slice(query_start, query_start + query_len), slice(kv_start, kv_start + kv_len)
        scores = torch.einsum("qhd,khd->hqk", query[rows].double(), keys[kv_rows]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values[kv_rows])
    return out


def make(query_lens, kv_lens, num_heads, num_kv_heads, head_dim, dtype):
    """q inside a fused qkv buffer, K and V interleaved in one slab, rows of other sequences (NaN) between."""
    generator = torch.Generator().manual_seed(sum(kv_lens) + head_dim)
    gap = 3
    query_start = numpy.cumsum([0, *query_lens[:-1]])
    kv_start = numpy.cumsum([gap, *(length + gap for length in kv_lens[:-1])])
    segments = Segments(query_start, query_lens, kv_start, kv_lens)
    fused = torch.randn(segments.query_end, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    content = torch.randn(segments.kv_end + gap, num_kv_heads, 2 * head_dim, generator=generator).to(dtype)
    slab = torch.full_like(content, float("nan"))
    for _, _, start, length in segments.rows:
        slab[start : start + length] = content[start : start + length]
    return fused[:, :num_heads], slab[..., :head_dim], slab[..., head_dim:], segments


def run(query, keys, values, segments, scale=0.2, window=0, softcap=0.0):
    out = torch.full(query.shape, float("nan"), dtype=query.dtype)
    assert native.attend(query, keys, values, out, segments.pointer, len(segments), scale, window, softcap)
    return out


def check(tensors, tolerance, scale=0.2, window=0, softcap=0.0):
    result = run(*tensors, scale, window, softcap)
    torch.testing.assert_close(result.double(), oracle(*tensors, scale, window, softcap), **tolerance)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_dims(instruction_set, dtype, tolerance, head_dim):
    check(make([1, 1, 3], [37, 300, 70], 8, 2, head_dim, dtype), tolerance, scale=head_dim**-0.5)


@pytest.mark.parametrize("heads", [(3, 3), (6, 3), (9, 3), (5, 1), (14, 2)], ids=str)
def test_groups(instruction_set, dtype, tolerance, heads):
    check(make([1, 1, 2], [1, 33, 129], *heads, 32, dtype), tolerance)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 50}, {"window": 700}, {"softcap": 5.0},
                                     {"window": 33, "softcap": 0.7}], ids=str)  # fmt: skip
def test_windows_and_soft_caps(instruction_set, dtype, tolerance, options):
    check(make([1, 8, 1, 5], [900, 260, 31, 5], 4, 2, 32, dtype), tolerance, scale=0.4, **options)


@pytest.mark.parametrize("kv_len", [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 513, 1025])
def test_every_kind_of_tail(instruction_set, kv_len):
    check(make([1], [kv_len], 4, 2, 32, torch.float32), {"rtol": 2e-6, "atol": 2e-6})


def test_short_prefills_are_causal(instruction_set, dtype, tolerance):
    check(make([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8], 6, 2, 48, dtype), tolerance)


def test_threads_do_not_change_a_bit(instruction_set, threads, dtype):
    tensors = make([1, 1, 4, 1], [3000, 17, 700, 256], 8, 2, 64, dtype)
    result = run(*tensors)
    torch.set_num_threads(1)
    assert torch.equal(result, run(*tensors))


def test_company_does_not_change_a_bit(instruction_set, threads, dtype):
    query, keys, values, segments = make([1, 1, 4, 1], [3000, 17, 700, 256], 8, 2, 64, dtype)
    together = run(query, keys, values, segments)
    for row in segments.rows:
        alone = run(query, keys, values, Segments(*([value] for value in row)))
        rows = slice(row[0], row[0] + row[1])
        assert torch.equal(together[rows], alone[rows])


def test_large_scores_do_not_overflow(instruction_set, dtype, tolerance):
    query, keys, values, segments = make([1, 1], [200, 40], 4, 2, 32, dtype)
    check((query * 30, keys, values, segments), tolerance | {"atol": 2 * tolerance["atol"]}, scale=1.0)


def test_not_applicable_is_false(instruction_set):
    def call(head_dim=32, dtype=torch.float32, spread=1):
        query = torch.zeros(1, 2, head_dim * spread, dtype=dtype)[..., ::spread]
        slab = torch.zeros(4, 1, head_dim, dtype=dtype)
        segments = Segments([0], [1], [0], [4])
        return native.attend(
            query, slab, slab, torch.zeros(1, 2, head_dim, dtype=dtype), segments.pointer, 1, 1.0, 0, 0.0
        )

    assert call()
    assert not call(head_dim=20)
    assert not call(dtype=torch.float64)
    assert not call(spread=2)
