"""`attend` against its definition in float64, over everything that may vary."""

import pytest
import torch
from attention_oracle import make, oracle

from flexrun import native
from flexrun.attention import Segments, attend, sdpa

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LSE_TOLERANCE = 5e-6  # float32 sums of products of any dtype


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def path(request, monkeypatch):
    """Both ways: with the native kernels (where built) and with torch operators only."""
    if request.param and not native.available:
        pytest.skip("the native library is not built")
    monkeypatch.setattr(native, "available", request.param)


def check(query, keys, values, segments, **options):
    expected, expected_lse = oracle(query, keys, values, segments, **options)
    tolerance = {"rtol": TOLERANCE[query.dtype], "atol": TOLERANCE[query.dtype]}
    out = torch.full(query.shape, float("nan"), dtype=query.dtype)
    assert attend(query, keys, values, segments, out=out, **options) is out
    torch.testing.assert_close(out.double(), expected, **tolerance)
    out.fill_(float("nan"))
    lse = torch.full((len(query), query.shape[1] + 3), float("nan"))[:, 1:-2]
    assert attend(query, keys, values, segments, out=out, lse=lse, **options) is out
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


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


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 30, "softcap": 2.0}, {"window": 300}], ids=str)
@pytest.mark.parametrize("query_len", [1, 3, 20])
def test_queries_anywhere_around_their_part_of_the_kv(path, dtype, options, query_len):
    positions = [-50, -query_len, 1 - query_len, -2, -1, 0, 5, 13, 14, 15, 16, 17, 18, 44, 400]
    tensors = make(
        [query_len] * len(positions),
        [15] * len(positions),
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        dtype=dtype,
        query_position=positions,
    )
    check(*tensors, scale=0.3, **options)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 128}, {"softcap": 2.0}], ids=str)
def test_sinks_take_their_share(path, dtype, options):
    lengths = [1, 4, 1, 9, 200, 2, 1], [1, 4, 33, 31, 210, 100, 5]
    tensors = make(*lengths, num_heads=6, num_kv_heads=2, head_dim=64, dtype=dtype)
    check(*tensors, scale=0.3, sinks=torch.linspace(-4, 4, 6), **options)


def test_sinks_of_queries_around_a_part_of_the_kv(path):
    positions = [-5, -1, 0, 6, 14, 15, 40]
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "dtype": torch.float32}
    for query_len in (1, 20):
        tensors = make([query_len] * 7, [15] * 7, query_position=positions, **sizes)
        for window in (0, 6):
            check(*tensors, scale=0.3, sinks=torch.tensor([0.5, -1.0, 9.0, -9.0]), window=window)


@pytest.mark.parametrize("query_len", [1, 9])
def test_an_empty_part_is_nothing_seen(path, query_len):
    tensors = make(
        [query_len] * 3,
        [0, 12, 0],
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        dtype=torch.bfloat16,
        query_position=[7, 12, 0],
    )
    check(*tensors, scale=0.3)


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
    [
        ([0], [1], [0], [0]),
        ([0], [0], [0], [3]),
        ([0], [4], [0], [3]),
        ([-1], [1], [0], [3]),
        ([0, 1], [1], [0], [3]),
        ([0], [1], [0], [3, 3]),
        ([0], [1], [0], [3], [2, 2]),
        ([0], [1], [0], [-1], [2]),
    ],
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
    for lse in (torch.empty(2, 3), torch.empty(4, 2).T, torch.empty(2, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="lse must be float32"):
            attend(query, keys, values, segments, scale=1.0, out=query.clone(), lse=lse)
    for sinks in (torch.zeros(3), torch.zeros(4).double(), torch.zeros(8)[::2]):
        with pytest.raises(ValueError, match="sinks must be contiguous float32"):
            attend(query, keys, values, segments, scale=1.0, sinks=sinks, out=query.clone())
    for query_, keys_, values_, out in refused:
        with pytest.raises(ValueError, match="attend"):
            attend(query_, keys_, values_, segments, scale=1.0, out=out.clone())
