"""Attention over compressed KV: kernels read records as torch brings them back, whatever else runs beside them."""

from __future__ import annotations

import numpy
import pytest
import torch

from flexrun import native
from flexrun.attention import Segments
from flexrun.compress import GROUP_TOKENS, KVFormat, quantise_kv
from flexrun.errors import ExecutionError
from flexrun.models.spec import AttentionForm
from flexrun.offload.coded_kv import CodedSlab, attend_coded, coded_rows, reads_codes, store_coded, store_late

LENGTHS = (1, 64, 65, 500, 1200, 2500)  # more than DENSE_TOKENS, and than a chunk of the kernels
WINDOWED = AttentionForm(0.3, 100, 5.0)


@pytest.fixture
def kernels(request):
    if not native.select(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.select(None)


def decoding(form, group, dtype, lengths=LENGTHS, seed=0):
    """(query, slab, segments, places): sequences that decode, of random KV, with a large channel of keys."""
    generator = torch.Generator().manual_seed(seed)
    counts = numpy.maximum(numpy.array(lengths) // GROUP_TOKENS, 1)
    shape = (int(counts.sum()), GROUP_TOKENS, form.heads, form.head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    keys[..., 1] *= 5
    records = torch.empty(shape[0], form.record_bytes, dtype=torch.uint8)
    quantise_kv(keys, values, form, records)
    recent = torch.randn(2, len(lengths), *shape[1:], generator=generator).to(dtype)
    query = torch.randn(len(lengths), form.heads * group, form.head_dim, generator=generator).to(dtype)
    starts = (numpy.cumsum(counts) - counts) * GROUP_TOKENS
    segments = Segments(numpy.arange(len(lengths)), numpy.ones(len(lengths)), starts, lengths)
    return query, CodedSlab(form, records, recent), segments, numpy.arange(len(lengths))[::-1].copy()


def attended(query, slab, segments, places, direct, form=None, sinks=None):
    out = torch.full_like(query, float("nan"))
    rows = coded_rows(segments, places, direct)
    attend_coded(query, slab, rows, [], form or AttentionForm(query.shape[2] ** -0.5), sinks, out)
    return out.float()


@pytest.mark.skipif(not native.available, reason="needs the native kernels")
@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize(("head_dim", "heads", "group"), [(64, 3, 3), (128, 1, 5), (80, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_attend_what_torch_brings_back(kernels, head_dim, heads, group, dtype):
    for bits in ((4, 4), (8, 8), (8, 4)):
        form = KVFormat(*bits, heads, head_dim)
        assert reads_codes(form)
        case = decoding(form, group, dtype)
        for how, sinks in ((None, None), (WINDOWED, torch.randn(heads * group))):
            expected, found = (attended(*case, direct, how, sinks) for direct in (False, True))
            # products in bfloat16 round factors of codes; otherwise all is float32
            rounds = (kernels == "avx512_bf16" and 4 in bits) or dtype is torch.bfloat16
            torch.testing.assert_close(
                found, expected, rtol=0, atol=0.02 if rounds else 2e-3 if dtype.itemsize == 2 else 1e-5
            )


@pytest.mark.skipif(not native.available, reason="needs the native kernels")
def test_kernels_tell_how_much_was_seen():
    """The log-sum-exp that joins what was attended elsewhere."""
    form = KVFormat(8, 8, 2, 64)
    query, slab, segments, places = decoding(form, 2, torch.float32)
    found = []
    for direct in (False, True):
        out, lse = torch.empty_like(query), torch.full(query.shape[:2], float("nan"))
        rows = coded_rows(segments, places, direct)
        attend_coded(query, slab, rows, [], AttentionForm(0.125), None, out, lse)
        found.append(lse)
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@pytest.mark.skipif(not native.available, reason="needs the native kernels")
def test_a_sequence_is_attended_alike_on_any_number_of_threads_and_beside_any_others():
    form = KVFormat(4, 4, 2, 64)
    query, slab, segments, places = decoding(form, 2, torch.float32)
    whole = attended(query, slab, segments, places, True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(attended(query, slab, segments, places, True), whole)
            for index in range(len(LENGTHS)):
                alone = Segments(*(column[index : index + 1] for column in segments.table[:4]))
                (out,) = attended(query, slab, alone, places[index : index + 1], True)[index : index + 1]
                assert torch.equal(out, whole[index])
    finally:
        torch.set_num_threads(threads)


def test_a_head_size_that_fills_no_vector_is_attended_by_torch():
    assert not reads_codes(KVFormat(4, 4, 2, 10))


@pytest.mark.parametrize("cuts", [(200,), (64, 136), (63, 2, 135), (1,) * 3 + (61, 70, 1, 1, 64)])
def test_groups_are_stored_alike_however_a_prompt_is_cut(cuts):
    form = KVFormat(8, 4, 2, 16)
    keys, values = torch.randn(2, 200, 2, 16)
    slab = CodedSlab(form, torch.zeros(5, form.record_bytes, dtype=torch.uint8), torch.zeros(2, 3, 64, 2, 16))
    done = 0
    for count in cuts:
        segments = Segments([0], [count], [GROUP_TOKENS], [done + count])
        rows = coded_rows(segments, numpy.array([2]), False)
        new = [plane[done : done + count] for plane in (keys, values)]
        store_coded(slab, rows, new, "KV")
        store_late(slab, rows, new)
        done += count
    expected = torch.empty(3, form.record_bytes, dtype=torch.uint8)
    quantise_kv(*(plane[:192].unflatten(0, (3, 64)) for plane in (keys, values)), form, expected)
    assert torch.equal(slab.records[1:4], expected)
    assert not slab.records[[0, 4]].any() and not slab.recent[:, :2].any()
    assert torch.equal(slab.recent[:, 2, :8], torch.stack((keys, values))[:, 192:])


def test_nan_is_refused_with_the_name_of_its_layer():
    form = KVFormat(4, 4, 2, 16)
    slab = CodedSlab(form, torch.zeros(2, form.record_bytes, dtype=torch.uint8), torch.zeros(2, 1, 64, 2, 16))
    new = list(torch.randn(2, 70, 2, 16))
    new[1][5, 1, 3] = float("nan")
    rows = coded_rows(Segments([0], [70], [0], [70]), numpy.array([0]), False)
    with pytest.raises(ExecutionError, match="KV cache of layer 7: values that are NaN"):
        store_coded(slab, rows, new, "KV cache of layer 7")
