"""Latent attention against its definition in float64: keys and values of every head made of the latents."""

import pytest
import torch
from attention_oracle import oracle

from flexrun import native
from flexrun.attention import Segments, attend_latent, latent

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2}
HEADS, NOPE, ROPE, RANK, VALUE = 6, 14, 10, 22, 12
LENGTHS = ([1, 4, 1, 9, 13, 2, 1, 40], [1, 4, 33, 31, 13, 100, 5, 90])


@pytest.fixture(params=[True, False], ids=["native", "torch"], autouse=True)
def path(request, monkeypatch):
    if request.param and not native.available:
        pytest.skip("the native library is not built")
    monkeypatch.setattr(native, "available", request.param)


def make(query_lens, kv_lens, dtype=torch.float32, sizes=(HEADS, NOPE, ROPE, RANK, VALUE), shuffled=False):
    """Ragged segments with rows of others (NaN) between; shuffled: query rows in another order than the KV rows."""
    heads, nope, rope, rank, value = sizes
    generator = torch.Generator().manual_seed(len(kv_lens))
    order = list(range(len(query_lens)))[:: -1 if shuffled else 1]
    query_start, tokens = [0] * len(order), 0
    for index in order:
        query_start[index], tokens = tokens, tokens + query_lens[index]
    kv_start, capacity = [], 2
    for length in kv_lens:
        kv_start.append(capacity)
        capacity += length + 3
    segments = Segments(query_start, query_lens, kv_start, kv_lens)
    query = torch.randn(tokens, heads, nope + rope, generator=generator).to(dtype)
    rows = torch.full((capacity, 1, rank + rope), float("nan"), dtype=dtype)
    for start, length in zip(kv_start, kv_lens):
        rows[start : start + length] = torch.randn(length, 1, rank + rope, generator=generator).to(dtype)
    kv_b = (torch.randn(heads, nope + value, rank, generator=generator) / rank**0.5).to(dtype)
    return query, rows, segments, kv_b


def expected(query, rows, segments, kv_b, scale):
    """Expanded in float64; the oracle's keys and values share a width, so the values are filled up with zeros."""
    heads, head_dim = query.shape[1:]
    rank = kv_b.shape[2]
    rope = rows.shape[2] - rank
    nope = head_dim - rope
    both = torch.einsum("tr,hnr->thn", rows[:, 0, :rank].double(), kv_b.double())
    keys = torch.cat([both[..., :nope], rows[..., rank:].double().expand(-1, heads, -1)], dim=-1)
    values = torch.nn.functional.pad(both[..., nope:], (0, head_dim - (both.shape[2] - nope)))
    out, _ = oracle(query.double(), keys, values, segments, scale=scale)
    return out[..., : both.shape[2] - nope]


def check(query, rows, segments, kv_b, value=VALUE, scale=0.21):
    out = torch.full((*query.shape[:2], value), float("nan"), dtype=query.dtype)
    assert attend_latent(query, rows, segments, kv_b, scale=scale, out=out) is out
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(
        out.double(), expected(query, rows, segments, kv_b, scale), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shuffled", [False, True])
def test_mixed_pass_of_decode_and_prefill_segments(dtype, shuffled):
    check(*make(*LENGTHS, dtype, shuffled=shuffled))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_sizes_of_the_published_models(dtype):
    sizes = (16, 128, 64, 512, 128)
    check(*make([1, 1, 30, 3], [40, 1, 30, 90], dtype, sizes), value=128, scale=192**-0.5)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_both_forms_are_the_same_attention(monkeypatch, form):
    def only(segments, *sizes):
        nothing = Segments([], [], [], [])
        return (segments, nothing) if form == "absorbed" else (nothing, segments)

    monkeypatch.setattr(latent, "_forms", only)
    check(*make(*LENGTHS))


@pytest.mark.parametrize("limit", [1, 700, 5000, 20_000])
def test_small_buffers(monkeypatch, limit):
    """Head by head, segment by segment, and blocks of the queries of one segment."""
    monkeypatch.setattr(latent, "LATENT_BYTES", limit)
    attended = []
    plain = latent.attend

    def watched(query, *rest, **options):
        attended.append(query.nbytes)
        return plain(query, *rest, **options)

    monkeypatch.setattr(latent, "attend", watched)
    check(*make(*LENGTHS))
    one_row = HEADS * (RANK + ROPE) * 4
    assert max(attended) <= max(limit, one_row)


def test_which_form_a_segment_takes():
    """At the sizes of DeepSeek-V3, by FLOPs: a decoded token is absorbed, a prompt is expanded."""
    segments = Segments([0, 1, 2, 40, 600], [1, 1, 8, 500, 300], [0] * 5, [1, 9000, 9000, 500, 3000])
    absorbed, expanded = latent._forms(segments, 192, 64, 128, 512, 2)
    assert absorbed.kv_len.tolist() == [1, 9000, 9000]
    assert expanded.kv_len.tolist() == [500, 3000]


def test_tensors_that_do_not_fit_are_refused():
    query, rows, segments, kv_b = make([2], [5])
    out = torch.empty(2, HEADS, VALUE)
    for wrong in (
        (query[:, :4], rows, kv_b, out),
        (query, rows[..., 1:], kv_b, out),
        (query, rows, kv_b[:, 1:], out),
        (query, rows, kv_b, out[:1]),
    ):
        with pytest.raises(ValueError, match="attend_latent"):
            attend_latent(wrong[0], wrong[1], segments, wrong[2], scale=1.0, out=wrong[3])


def test_rows_of_no_segment_are_left_as_they_are():
    query, rows, segments, kv_b = make([3, 2], [3, 9])
    out = torch.full((5, HEADS, VALUE), 7.0)
    attend_latent(query, rows, Segments(*segments.table[:, 1:]), kv_b, scale=1.0, out=out)
    assert (out[:3] == 7.0).all() and (out[3:] != 7.0).all()
