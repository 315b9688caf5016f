"""Decode attention over a KV cache in 8 and 4 bits, beside the same cache in the model's dtype, in RAM.

    python benchmarks/coded_attention.py [--threads N] [--dtype bfloat16] [--head-dims 64 128] [--rounds 9]

As benchmarks/attention.py, whose slab this measures against: KV many times larger than the caches, allocated as the
engine does it. In a round the compressed caches, the uncompressed one and a plain read of as many bytes run after one
another; figures are medians of the rounds, ratios medians of each round's own. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import numpy
import torch
from attention import Case

from flexrun import native
from flexrun.attention import Segments, attend
from flexrun.compress import GROUP_TOKENS, KVFormat, quantise_kv
from flexrun.config import KV_BITS
from flexrun.core import DTYPES, Tier
from flexrun.hardware.identity import machine_name
from flexrun.models.spec import AttentionForm
from flexrun.offload.coded_kv import CodedSlab, attend_coded, coded_rows, reads_codes
from flexrun.offload.tiers import MemoryTier


def measure(case: Case, rounds: int) -> list[dict]:
    """A row for each number of bits."""
    dtype, lengths, tier = DTYPES[case.dtype], case.lengths, MemoryTier(Tier.CPU, None)
    tokens, sequences = int(lengths.sum()), len(lengths)
    shape = (2, tokens, case.kv_heads, case.head_dim)
    block = torch.randn(2, GROUP_TOKENS * 8, *shape[2:]).to(dtype)
    buffer = tier.allocate("kv", torch.Size(shape).numel() * dtype.itemsize, touch=True)
    slab = buffer.view(0, shape, dtype)
    for start in range(0, tokens, block.shape[1]):
        slab[:, start : start + block.shape[1]] = block[:, : tokens - start]
    query = torch.randn(sequences, case.kv_heads * case.group, case.head_dim).to(dtype)
    out, starts = torch.empty_like(query), numpy.cumsum(lengths) - lengths
    segments = Segments(numpy.arange(sequences), numpy.ones(sequences), starts, lengths)
    scale = case.head_dim**-0.5
    words = buffer.data[: buffer.data.numel() // 4 * 4].view(torch.float32)
    ways = {
        "read": words.sum,
        case.dtype: lambda: attend(query, slab[0], slab[1], segments, scale=scale, out=out),
    }
    nbytes, kept = {"read": words.nbytes, case.dtype: slab.nbytes}, [buffer]
    groups = lengths // GROUP_TOKENS
    firsts = (numpy.cumsum(groups) - groups) * GROUP_TOKENS
    for name, bits in KV_BITS.items():
        if bits is None:
            continue
        form = KVFormat(*bits, case.kv_heads, case.head_dim)
        few = torch.empty(8, form.record_bytes, dtype=torch.uint8)
        quantise_kv(*block.unflatten(1, (8, GROUP_TOKENS)), form, few)
        held = tier.allocate("kv", int(groups.sum()) * form.record_bytes, touch=True)
        records = held.view(0, (int(groups.sum()), form.record_bytes), torch.uint8)
        for start in range(0, len(records), 8):
            records[start : start + 8] = few[: len(records) - start]
        recent = torch.randn(2, sequences, GROUP_TOKENS, *shape[2:]).to(dtype)
        whole = Segments(segments.query_start, segments.query_len, firsts, groups * GROUP_TOKENS + 1)
        rows = coded_rows(whole, numpy.arange(sequences), reads_codes(form))
        coded = CodedSlab(form, records, recent)
        kept.append(held)
        nbytes[name] = records.nbytes

        def attend_it(coded=coded, rows=rows) -> None:
            attend_coded(query, coded, rows, [], AttentionForm(scale), None, out)

        ways[name] = attend_it
    seconds: dict = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    for each in kept:
        each.close()
    read = [nbytes["read"] / each for each in seconds["read"]]

    def median(values) -> float:
        return statistics.median(values)

    return [
        {
            "case": case.name,
            "kv_bits": 16 if name == case.dtype else name,
            "kv_bytes": nbytes[name],
            "byte_ratio": nbytes[case.dtype] / nbytes[name],
            "times_as_fast": median(whole / own for whole, own in zip(seconds[case.dtype], seconds[name])),
            "bytes_per_second": median(nbytes[name] / each for each in seconds[name]),
            "read_bytes_per_second": median(read),
            "share_of_read_bandwidth": median(nbytes[name] / own / rate for own, rate in zip(seconds[name], read)),
        }
        for name in ways
        if name != "read"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--groups", nargs="+", type=int, default=[4], help="query heads of each of the 8 KV heads")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{machine_name()}, {arguments.threads} threads, kernels: {native.instruction_set}, torch {torch.__version__}\n"
    )
    print(f"{'case':34} {'KV':>5} {'bytes':>6} {'times as fast':>13} {'GB/s':>6} {'read GB/s':>9} {'share':>6}")
    results = []
    with torch.inference_mode():
        for head_dim in arguments.head_dims:
            for group in arguments.groups:
                for row in measure(Case(arguments.dtype, head_dim, group=group), arguments.rounds):
                    results.append(row)
                    print(
                        f"{row['case']:34} {row['kv_bits']!s:>5} 1/{row['byte_ratio']:4.2f} "
                        f"{row['times_as_fast']:13.2f} "
                        f"{row['bytes_per_second'] / 1e9:6.1f} {row['read_bytes_per_second'] / 1e9:9.1f} "
                        f"{row['share_of_read_bandwidth']:6.2f}",
                        flush=True,
                    )
    print("\n" + json.dumps({"machine": machine_name(), "load": os.getloadavg(), "cases": results}))


if __name__ == "__main__":
    main()
