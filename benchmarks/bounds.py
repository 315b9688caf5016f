"""What the machine allows: its matmul rate at a model's shapes and its disk's direct read rate, beside a job's needs.

    python benchmarks/bounds.py --model DIR --disk-dir DIR --disk

Prints one JSON line, for bfloat16 as the benchmarks run it. A run is judged by its distance from these, which no
engine can change.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flexrun.core import DTYPES, align_up
from flexrun.disk_io import BLOCK_BYTES, Block, DirectFile
from flexrun.llm import open_model
from flexrun.llm.model_files import cache_stem
from flexrun.machine import available_cores
from flexrun.models.ops import can_pack, linear, pack_matrix
from flexrun.models.spec import ModelSpec
from flexrun.offload.tiers import Buffer
from flexrun.weights.packed import open_packed

ROWS = (64, 512)
SECONDS_A_SHAPE = 0.6
READ_BYTES = 1 << 30
READ_THREADS = 3


def job_flops(spec: ModelSpec, sequences: int, prompt_tokens: int, output_tokens: int) -> dict[str, float]:
    """FLOPs of matrix products and attention: prefill makes the first token, decode the others."""
    layers = sum(
        spec.flops_per_token(module, layer)
        for layer in range(spec.num_layers)
        for module in ("attention", "mlp", "experts")
    )
    head = spec.flops_per_token("head")

    def attention(first_context: int, tokens: int) -> int:
        pairs = sum(range(first_context, first_context + tokens))
        return spec.num_layers * spec.attention_flops_per_token(1) * pairs

    prefill = layers * prompt_tokens + head + attention(1, prompt_tokens)
    decoded = output_tokens - 1
    decode = (layers + head) * decoded + attention(prompt_tokens + 1, decoded)
    return {"prefill_flops": sequences * prefill, "decode_flops": sequences * decode}


def matmul_rates(spec: ModelSpec) -> dict[str, float]:
    """FLOP/s of one layer's matrices at each row count, each shape by the faster of plain and packed weights."""
    dtype, rates = DTYPES[spec.dtype], {}
    tensors = [tensor for tensor in spec.layer_tensors(0) if len(tensor.shape) == 2]
    shapes = [tensor.shape for tensor in tensors if tensor.module != "experts" or tensor.name.startswith("expert.0.")]
    for rows in ROWS:
        flops = seconds = 0.0
        for shape in shapes:
            flops += 2.0 * rows * shape[0] * shape[1]
            seconds += _best_seconds(rows, shape, dtype)
        rates[str(rows)] = flops / seconds
    return rates


def _best_seconds(rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    # Copies enough that no weight is still in a CPU cache when its turn comes again.
    copies = min(max((256 << 20) // (shape[0] * shape[1] * dtype.itemsize), 1), 32)
    x = torch.randn(rows, shape[1]).to(dtype)
    plain = [torch.randn(shape).to(dtype) for _ in range(copies)]
    forms = [plain] + ([[pack_matrix(weight) for weight in plain]] if can_pack(dtype) else [])
    best = float("inf")
    with torch.inference_mode():
        for weights in forms:
            linear(x, weights[0])
            end, turn = time.perf_counter() + SECONDS_A_SHAPE / len(forms), 0
            while turn < 3 or time.perf_counter() < end:
                start = time.perf_counter()
                linear(x, weights[turn % copies])
                best, turn = min(best, time.perf_counter() - start), turn + 1
    return best


def disk_rate(folder: Path) -> dict:
    """Bytes a second of direct reads of the packed files: 4 MiB requests, as many in flight as there are threads."""
    files = [DirectFile(path) for path in sorted(folder.glob("layer-*.bin"))]
    memory = Buffer.outside_budget(READ_THREADS * BLOCK_BYTES)
    base = memory.data.data_ptr()
    places = [
        (file, offset, min(BLOCK_BYTES, size - offset))
        for file in files
        for size in [align_up(file.path.stat().st_size)]
        for offset in range(0, size, BLOCK_BYTES)
    ][: READ_BYTES // BLOCK_BYTES]

    def read(thread: int) -> int:
        done = 0
        for file, offset, nbytes in places[thread::READ_THREADS]:
            Block(file, offset, nbytes, base + thread * BLOCK_BYTES).read()
            done += nbytes
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        total = sum(pool.map(read, range(READ_THREADS)))
    seconds = time.perf_counter() - start
    direct = all(file.direct for file in files)
    for file in files:
        file.close()
    memory.close()
    return {"bytes_per_second": total / seconds, "bytes_read": total, "seconds": seconds, "direct": direct}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--disk-dir", type=Path, help="packed weights; written there if absent")
    parser.add_argument("--disk", action="store_true", help="measure the disk as well")
    arguments = parser.parse_args()
    torch.set_num_threads(available_cores())
    files = open_model(arguments.model, dtype="bfloat16")
    spec = files.spec
    flops = job_flops(spec, arguments.sequences, arguments.prompt_tokens, arguments.output_tokens)
    result = {
        "model": str(files.path.resolve()),
        "vocab_size": spec.vocab_size,
        "weight_bytes": spec.weight_bytes,
        "dtype": spec.dtype,
        "cores": available_cores(),
        **flops,
        "matmul_flops_per_second": matmul_rates(spec),
    }
    if arguments.disk:
        packed = open_packed(files.reader, spec, arguments.disk_dir, name=cache_stem(files), progress=False)
        result["disk"] = disk_rate(packed.folder)
        result["packed_folder"] = str(packed.folder)
    files.close()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
