"""The device form against float64, on the CPU's tensors: its own arrangement of ragged segments, sinks included."""

from types import SimpleNamespace

import pytest
import torch
from attention_oracle import make, oracle

from flexrun.attention import Segments, device, prepare

DTYPES = {torch.float32: 3e-6, torch.bfloat16: 8e-3}
OPTIONS = [{}, {"window": 9}, {"softcap": 2.0}, {"sinks": True}, {"sinks": True, "window": 9, "softcap": 2.0}]
LENGTHS = ([1, 4, 1, 9, 1, 40, 1], [1, 4, 33, 31, 36, 100, 90])
LAST_PARTS = ([1, 4, 1, 9, 1, 40, 1], [0, 0, 33, 3, 36, 100, 90])  # some sequences begin later than this slab, or in it
POSITIONS = [kv - query for query, kv in zip(*LAST_PARTS)]
BEFORE, BEHIND = ([1, 3, 1, 40], [7, 50, 33, 20]), [7, 55, 33, 20]  # parts that all rows lie behind


def upload(name, values):
    return values


def check(query, keys, values, segments, **options):
    sinks = torch.linspace(-3, 3, query.shape[1]) if options.get("sinks") else None
    options = {"scale": 0.3, "window": 0, "softcap": 0.0, **options, "sinks": sinks}
    expected, expected_lse = oracle(query, keys, values, segments, **options)
    prepare(segments, upload)
    for lse in (None, torch.full(query.shape[:2], float("nan"))):
        out = torch.full(query.shape, float("nan"), dtype=query.dtype)
        assert device.attend_on_device(query, keys, values, segments, **options, out=out, lse=lse)
        torch.testing.assert_close(out.double(), expected, rtol=DTYPES[query.dtype], atol=DTYPES[query.dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gathered_and_one_by_one(dtype, heads, options):
    sizes = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": 32, "dtype": dtype}
    check(*make(*LENGTHS, **sizes, gap=0), **options)
    check(*make(*LAST_PARTS, **sizes, gap=0, query_position=POSITIONS), **options)
    if not options.get("window"):
        check(*make(*BEFORE, **sizes, gap=0, query_position=BEHIND), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("order", ["decode first", "mixed"])
def test_packed_segments_through_a_kernel_that_knows_no_sinks(monkeypatch, options, order):
    """A stand-in of torch's variable-length kernel: its arguments, and its log-sum-exp of [heads, rows]."""

    def kernel(out, query, keys, values, starts, kv_starts, longest, longest_kv, *, scale, window_size, enable_gqa,
               seqused_k, return_aux=None):  # fmt: skip
        query_len = starts.diff().numpy()
        kv_len = seqused_k.numpy()
        part = Segments(starts[:-1].numpy(), query_len, kv_starts[:-1].numpy(), kv_len, kv_len - query_len)
        assert longest == query_len.max() and longest_kv == seqused_k.max()
        assert window_size[1] == (-1 if whole else 0)
        if whole:
            part = Segments(*part.table[:4], kv_len)
        result, lse = oracle(query, keys, values, part, scale=scale, window=window_size[0] + 1)
        out.copy_(result)
        lse[lse.isneginf()] = float("inf")  # as the kernel says of rows that see nothing
        return (out, lse.float().t()) if return_aux is not None and return_aux.lse else out

    whole = False
    varlen = SimpleNamespace(varlen_attn_out=kernel, AuxRequest=lambda lse: SimpleNamespace(lse=lse))
    monkeypatch.setattr(device, "_varlen", lambda: varlen)
    monkeypatch.setattr(device, "_flash_applies", lambda query: True)
    lengths = LENGTHS if order == "mixed" else ([1, 1, 5, 30], [7, 60, 5, 50])
    sizes = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "dtype": torch.float32, "gap": 0}
    check(*make(*lengths, **sizes), **options)
    check(*make(*LAST_PARTS, **sizes, query_position=POSITIONS), **options)
    if not options.get("window"):
        whole = True
        check(*make(*BEFORE, **sizes, query_position=BEHIND), **options)


def test_first_parts_of_sequences_are_left_to_the_caller():
    query, keys, values, segments = make(
        [2], [5], num_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32, query_position=[2]
    )
    options = {"scale": 1.0, "window": 0, "softcap": 0.0, "sinks": None}
    assert not device.attend_on_device(query, keys, values, segments, **options, out=query.clone())
