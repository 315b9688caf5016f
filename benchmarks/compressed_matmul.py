"""Products with 4- and 8-bit matrices on the CPU, beside those with the same matrices in bfloat16.

    python benchmarks/compressed_matmul.py [--threads N] [--width 2048] [--outputs 5632] [--rows 1 4 8 16 64 256]

Cycles through more matrices than a cache holds, all ways interleaved in one run, each at its best round. Gives the
share of the bound: the bytes of the matrix at the read bandwidth of a plain sum, or the FLOPs at the rate of the
bfloat16 product of 512 rows. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from flexrun import native
from flexrun.compress.groupwise import GroupFormat, dequantise, quantise, split
from flexrun.models.ops import can_pack, linear, pack_matrix

POOL_BYTES = 192 << 20  # of bfloat16 matrices
DTYPE = torch.bfloat16


def pool_of(outputs: int, width: int) -> list[torch.Tensor]:
    count = max(POOL_BYTES // (outputs * width * DTYPE.itemsize), 2)
    first = torch.randn(outputs, width).mul_(0.02).to(DTYPE)
    return [first.roll(number, 0).contiguous() for number in range(count)]


def int4pack(matrix: torch.Tensor, group: int):
    """The same grid in the layout of torch's own 4-bit product, whose value is (code - 8) * scale + zero."""
    form = GroupFormat(4, group)
    shape = tuple(matrix.shape)
    data = quantise(matrix, form)
    factors = split(data, shape, form)[1].float().permute(0, 3, 1, 2).flatten(0, 1)[: shape[0]]
    scale, minimum = factors.unbind(-1)
    wide = (scale.repeat_interleave(group, 1)[:, : shape[1]], minimum.repeat_interleave(group, 1)[:, : shape[1]])
    plain = ((dequantise(data, shape, form, torch.float32) - wide[1]) / wide[0]).round().to(torch.int32)
    scales = torch.stack((scale, minimum + 8 * scale), -1).to(DTYPE).transpose(0, 1).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(plain.contiguous(), 1), scales


def ways(matrices, rows: int, group: int) -> dict:
    """name -> a call that takes the number of a matrix; bytes of one matrix each."""
    outputs, width = matrices[0].shape
    x = torch.randn(rows, width).to(DTYPE)
    out, scratch = torch.empty(rows, outputs, dtype=DTYPE), torch.empty(outputs, width, dtype=DTYPE)
    result = {"bfloat16": (lambda n: linear(x, matrices[n]), matrices[0].nbytes)}
    if can_pack(DTYPE):
        blocked = [pack_matrix(matrix) for matrix in matrices]
        result["bfloat16 blocked"] = (lambda n: linear(x, blocked[n]), matrices[0].nbytes)
    for bits in (8, 4):
        form = GroupFormat(bits, group)
        packed = [quantise(matrix, form) for matrix in matrices[:2]]
        packed = [packed[n % 2].clone() for n in range(len(matrices))]
        parts = [split(data, (outputs, width), form) for data in packed]

        def direct(n, parts=parts, bits=bits):
            assert native.multiply(x, *parts[n], bits, group, None, out)

        def through_scratch(n, parts=parts, bits=bits):
            native.dequantise(*parts[n], bits, group, scratch)
            torch.mm(x, scratch.t(), out=out)

        result[f"{bits} bits"] = (direct, len(packed[0]))
        result[f"{bits} bits, scratch"] = (through_scratch, len(packed[0]))
    small = [int4pack(matrices[n], group) for n in range(2)]
    small = [tuple(part.clone() for part in small[n % 2]) for n in range(len(matrices))]
    result["torch int4pack"] = (
        lambda n: torch.ops.aten._weight_int4pack_mm_for_cpu(x, small[n][0], group, small[n][1]),
        outputs * width // 2,
    )
    return result


def best_seconds(calls: dict, count: int, rounds: int) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    number = 0
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(4):
                number = (number + 1) % count
                call(number)
            best[name] = min(best[name], (time.perf_counter() - start) / 4)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--outputs", type=int, default=5632)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    matrices = pool_of(arguments.outputs, arguments.width)
    elements = arguments.outputs * arguments.width
    reading = best_seconds({"sum": lambda n: matrices[n].view(torch.float32).sum()}, len(matrices), 8)["sum"]
    read_bytes = matrices[0].nbytes / reading
    widest = ways(matrices, 512, arguments.group)
    name = "bfloat16 blocked" if "bfloat16 blocked" in widest else "bfloat16"
    peak = 2 * 512 * elements / best_seconds({name: widest[name][0]}, len(matrices), 4)[name]
    print(
        f"[{arguments.outputs}, {arguments.width}], groups of {arguments.group}, {arguments.threads} threads, kernels: "
        f"{native.instruction_set}, torch {torch.__version__}; reads {read_bytes / 1e9:.1f} GB/s, "
        f"bfloat16 peak {peak / 1e9:.0f} GFLOP/s"
    )
    form = GroupFormat(4, arguments.group)
    scratch = torch.empty(arguments.outputs, arguments.width, dtype=DTYPE)
    packed = [split(quantise(matrices[0], form), tuple(matrices[0].shape), form) for _ in range(8)]
    bring = best_seconds(
        {
            "dequantise": lambda n: native.dequantise(*packed[n % 8], 4, arguments.group, scratch),
            "copy": lambda n: scratch.copy_(matrices[n]),
        },
        len(matrices),
        arguments.rounds,
    )
    written = {name: scratch.nbytes / seconds / 1e9 for name, seconds in bring.items()}
    print(f"4 bits to bfloat16: {written['dequantise']:.1f} GB/s written; a copy: {written['copy']:.1f} GB/s\n")
    results = {}
    print(f"{'rows':>5}  {'way':18} {'ms':>8} {'GFLOP/s':>8} {'bound':>6} {'x bf16':>7}")
    for rows in arguments.rows:
        calls = ways(matrices, rows, arguments.group)
        best = best_seconds({name: call for name, (call, _) in calls.items()}, len(matrices), arguments.rounds)
        results[rows] = {}
        base = min(seconds for name, seconds in best.items() if name.startswith("bfloat16"))
        for name, seconds in best.items():
            bound = max(calls[name][1] / read_bytes, 2 * rows * elements / peak)
            results[rows][name] = {"seconds": seconds, "share_of_bound": bound / seconds, "speed": base / seconds}
            print(
                f"{rows:5}  {name:18} {seconds * 1e3:8.3f} {2 * rows * elements / seconds / 1e9:8.0f} "
                f"{bound / seconds:6.2f} {base / seconds:7.2f}",
                flush=True,
            )
    print()
    print(
        json.dumps(
            {"arguments": vars(arguments), "kernels": native.instruction_set, "torch": torch.__version__}
            | {"read_bytes_per_second": read_bytes, "peak_flops_per_second": peak, "written": written, "rows": results}
        )
    )


if __name__ == "__main__":
    main()
