"""Runs every kernel of a library on tensors that end where the kernels' work ends: for a library with sanitizers.

    FLEXRUN_NATIVE=<library> LD_PRELOAD=<libasan.so> ASAN_OPTIONS=detect_leaks=0 python every_kernel.py [FAULT]

FAULT: the name of a tensor that is made one row too short, which the sanitizer has to notice.
"""

import sys
from itertools import product
from pathlib import Path

import torch

sys.path[0:0] = [str(Path(__file__).parents[1])]
from attention_oracle import make, oracle  # noqa: E402

from flexrun import native  # noqa: E402
from flexrun.compress.groupwise import GroupFormat, dequantise, quantise, split  # noqa: E402
from flexrun.compress.kv_groups import GROUP_TOKENS, KVFormat, dequantise_kv, quantise_kv  # noqa: E402

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LENGTHS = ([1, 2, 8, 1], [1, 35, 8, 291])  # query, KV
PART = ([1, 3, 2], [0, 7, 33], [5, -1, 60])  # query, KV, position of the queries


def tensors(query_lens, kv_lens, dtype, head_dim, position=None):
    """As the tests make them, each in an allocation of exactly its size."""
    sizes = {"num_heads": 6, "num_kv_heads": 2, "head_dim": head_dim, "dtype": dtype}
    query, keys, values, segments = make(query_lens, kv_lens, query_position=position, gap=0, **sizes)
    return query.clone(), keys.clone(), values.clone(), segments


def attend(query, keys, values, segments, long, **options):
    out, lse = torch.empty_like(query), torch.empty(query.shape[:2])
    called = native.attend(
        query, keys, values, out, segments.pointer, len(segments), 0.2, options.get("window", 0),
        options.get("softcap", 0.0), long, lse, options.get("sinks"),
    )  # fmt: skip
    return called, out, lse


def check_attention(dtype, head_dim, lengths, long, **options):
    query, keys, values, segments = tensors(*lengths[:2], dtype, head_dim, *lengths[2:])
    called, out, lse = attend(query, keys, values, segments, long, **options)
    if not called:
        assert long and (dtype != torch.bfloat16 or native.instruction_set != "avx512_bf16")
        return
    expected, expected_lse = oracle(query, keys, values, segments, scale=0.2, **options)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def check_elementwise(dtype, width):
    def random(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(width)).to(dtype)

    hidden, out = random(5, width), torch.empty(5, width, dtype=dtype)
    assert native.rms_norm(hidden, random(width), 1e-5, 1.0, out, branch=random(5, width))
    for kind in ("silu", "gelu_tanh"):
        assert native.gated_activation(random(5, 2 * width), kind, out)
    angle = torch.ones(5, width)
    assert native.apply_rope(random(5, 3, 2 * width), angle, angle) and out.isfinite().all()


def check_compressed(dtype, bits, group, shape, rows):
    form = GroupFormat(bits, group)
    data = quantise(torch.randn(shape, generator=torch.Generator().manual_seed(rows)), form)
    codes, factors = (part.clone() for part in split(data, shape, form))
    back, out = torch.empty(shape, dtype=dtype), torch.empty(rows, shape[0], dtype=dtype)
    x, bias = torch.ones(rows, shape[1], dtype=dtype), torch.zeros(shape[0], dtype=dtype)
    assert native.dequantise(codes, factors, bits, group, back)
    expected = dequantise(data, shape, form, torch.float32).sum(1).expand_as(out)
    for x_bits in (16, 8):
        assert native.multiply(x, codes, factors, bits, group, bias, out, x_bits)
        torch.testing.assert_close(out.float(), expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def check_compressed_kv(dtype, bits, head_dim):
    """Three sequences of no, one and five records (more than a chunk), each with a newest row or some."""
    form, heads, counts, newest = KVFormat(*bits, 2, head_dim), 6, (0, 1, 5), (1, 64, 7)
    generator = torch.Generator().manual_seed(head_dim)
    keys, values = torch.randn(2, sum(counts), GROUP_TOKENS, 2, head_dim, generator=generator).to(dtype)
    records = torch.empty(sum(counts), form.record_bytes, dtype=torch.uint8)
    quantise_kv(keys, values, form, records)
    recent = torch.randn(2, sum(newest), 2, head_dim, generator=generator).to(dtype)
    query, out = torch.randn(2, 3, heads, head_dim, generator=generator).to(dtype)
    query, out = query.clone(), out.clone()
    firsts = [[sum(sizes[:index]) for index in range(3)] for sizes in (counts, newest)]
    table = torch.tensor([range(3), firsts[0], counts, firsts[1], newest])
    options = {"scale": 0.2, "window": 0, "softcap": 0.0, "sinks": None}
    assert native.attend_coded(query, records, recent, form, table.data_ptr(), 3, options, out)
    back = dequantise_kv(records, form, torch.float32)
    for index in range(3):
        record, row = (first[index] for first in firsts)
        old = back[:, record * GROUP_TOKENS : (record + counts[index]) * GROUP_TOKENS]
        keys, values = torch.cat((old, recent[:, row : row + newest[index]].float()), 1).repeat_interleave(3, 2)
        weights = torch.einsum("hd,thd->ht", query[index].float(), keys).mul(0.2).softmax(1)
        expected = torch.einsum("ht,thd->hd", weights, values)
        torch.testing.assert_close(out[index].float(), expected, rtol=0.02, atol=0.02)


def plant(fault):
    query, keys, values, segments = tensors([1, 40], [300, 70], torch.bfloat16, 128)
    short = {"keys": keys, "values": values, "query": query}
    short[fault] = short[fault][:-1].clone()
    attend(short["query"], short["keys"], short["values"], segments, False)


def main():
    torch.set_num_threads(2)
    if len(sys.argv) > 1:
        return plant(sys.argv[1])
    runs = 0
    for name in filter(native.select, INSTRUCTION_SETS):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for dtype, head_dim in product(TOLERANCE, (16, 64, 80, 96, 128, 256)):
                check_attention(dtype, head_dim, LENGTHS, False, sinks=torch.linspace(-1, 1, 6))
                check_attention(dtype, head_dim, PART, False, window=(0, 5)[threads % 2])
                check_attention(dtype, head_dim, ([70, 9], [70, 139]), True, sinks=torch.linspace(-1, 1, 6))
                check_attention(dtype, head_dim, ([70, 9], [3, 20], [-5, 9]), True, softcap=2.0)
            for dtype, width in product(TOLERANCE, (1, 15, 33)):
                check_elementwise(dtype, width)
            for dtype, bits, rows in product(TOLERANCE, (4, 8), (1, 7)):
                for shape, group in product(((1, 1), (70, 70), (130, 300)), (32, 128)):
                    check_compressed(dtype, bits, group, shape, rows)
            for dtype, bits, head_dim in product(TOLERANCE, ((4, 4), (8, 8), (8, 4)), (16, 64, 80, 128)):
                check_compressed_kv(dtype, bits, head_dim)
        print(f"{name}: passed")
        runs += 1
    assert runs, "no instruction set ran"


if __name__ == "__main__":
    main()
