"""`attend` against its definition in float64, over everything that may vary."""

import numpy
import pytest
import torch

from flexrun import native
from flexrun.attention import Segments, attend, sdpa

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def oracle(query, keys, values, segments, *, scale, window=0, softcap=0.0):
    """The definition, in float64 with explicit masks; rows of no segment are zero."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    keys, values = (slab.double().repeat_interleave(group, dim=1) for slab in (keys, values))
    for query_start, query_len, kv_start, kv_len in segments.rows:
        position, seen = torch.arange(kv_len - query_len, kv_len)[:, None], torch.arange(kv_len)
        visible = (seen <= position) & (seen > position - (window or kv_len))
        rows, kv_rows = slice(query_start, query_start + query_len), slice(kv_start, kv_start + kv_len)
        scores = torch.einsum("qhd,khd->hqk", query[rows].double(), keys[kv_rows]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values[kv_rows])
    return out


def make(query_lens, kv_lens, *, num_heads, num_kv_heads, head_dim, dtype, gap=3):
    """Random tensors: q inside a fused qkv buffer, K and V interleaved in one slab, gaps between the sequences."""
    generator = torch.Generator().manual_seed(sum(kv_lens) + head_dim)
    query_start = numpy.cumsum([0, *query_lens[:-1]])
    kv_start = numpy.cumsum([gap, *(length + gap for length in kv_lens[:-1])])
    segments = Segments(query_start, numpy.array(query_lens), kv_start, numpy.array(kv_lens))
    fused = torch.randn(segments.query_end, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    slab = torch.randn(segments.kv_end + gap, num_kv_heads, 2 * head_dim, generator=generator).to(dtype)
    return fused[:, :num_heads], slab[..., :head_dim], slab[..., head_dim:], segments


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def path(request, monkeypatch):
    """Both ways: with the native kernels (where built) and with torch operators only."""
    if request.param and not native.available:
        pytest.skip("the native library is not built")
    monkeypatch.setattr(native, "available", request.param)


def check(query, keys, values, segments, **options):
    expected = oracle(query, keys, values, segments, **options)
    out = torch.full(query.shape, float("nan"), dtype=query.dtype)
    assert attend(query, keys, values, segments, out=out, **options) is out
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[query.dtype], atol=TOLERANCE[query.dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}, {"window": 7, "softcap": 3.0}], ids=str)
def test_mixed_pass_of_decode_and_prefill_segments(path, dtype, heads, options):
    num_heads, num_kv_heads = heads
    tensors = make(
        [1, 4, 1, 9, 13, 2, 1],
        [1, 4, 33, 31, 13, 100, 5],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=24,
        dtype=dtype,
    )
    check(*tensors, scale=0.3, **options)


@pytest.mark.parametrize("window", [0, 1, 40, 300, 5000])
def test_prefill_chunk_longer_than_a_query_block(path, window):
    tensors = make([600, 1], [777, 500], num_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    check(*tensors, scale=0.25, window=window)


def test_long_context_bounds_the_mask_and_the_scores(monkeypatch):
    monkeypatch.setattr(sdpa, "MASK_ELEMENTS", 1000)
    monkeypatch.setattr(sdpa, "SCORE_ELEMENTS", 1000)
    tensors = make([50, 61], [90, 61], num_heads=2, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    shapes = []
    band = sdpa._causal_band
    monkeypatch.setattr(sdpa, "_causal_band", lambda *sizes: shapes.append(sizes[:2]) or band(*sizes))
    check(*tensors, scale=0.3)
    check(*tensors, scale=0.3, softcap=2.0)
    assert max(query_len * kv_len for query_len, kv_len in shapes) <= 1000


def test_rows_outside_every_segment_are_untouched(path):
    query, keys, values, _ = make([4], [9], num_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    out = torch.full(query.shape, 7.0)
    attend(query, keys, values, Segments([1], [2], [0], [6]), scale=1.0, out=out)
    assert (out[[0, 3]] == 7.0).all() and (out[1:3] != 7.0).all()


def test_a_sequence_does_not_depend_on_its_company(path):
    together = make([1, 5, 1], [40, 22, 17], num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float32)
    query, keys, values, segments = together
    out = attend(*together, scale=0.2, out=torch.empty(query.shape))
    for row in segments.rows:
        alone = Segments(*([value] for value in row))
        part = attend(query, keys, values, alone, scale=0.2, out=torch.zeros(query.shape))
        rows = slice(row[0], row[0] + row[1])
        torch.testing.assert_close(part[rows], out[rows], rtol=1e-5, atol=1e-6)


def test_no_segments_is_no_work(path):
    empty = Segments([], [], [], [])
    query = torch.zeros(0, 2, 16)
    assert attend(query, torch.zeros(4, 1, 16), torch.zeros(4, 1, 16), empty, scale=1.0, out=query) is query


@pytest.mark.parametrize(
    "columns",
    [([0], [1], [0], [0]), ([0], [0], [0], [3]), ([0], [4], [0], [3]), ([-1], [1], [0], [3]), ([0, 1], [1], [0], [3])],
)
def test_segments_that_cannot_be_are_refused(columns):
    with pytest.raises(ValueError, match="segments"):
        Segments(*columns)


def test_tensors_that_do_not_fit_are_refused():
    query, keys, values, segments = make([2], [5], num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    refused = [
        (query[:1], keys, values, query[:1]),
        (query, keys[:4], values[:4], query),
        (query, keys[..., :8], values, query),
        (query, keys, values.half(), query),
        (query[:, :3], keys, values, query[:, :3]),
    ]
    for query_, keys_, values_, out in refused:
        with pytest.raises(ValueError, match="attend"):
            attend(query_, keys_, values_, segments, scale=1.0, out=out.clone())
