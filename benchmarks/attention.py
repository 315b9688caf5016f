"""Decode attention on the CPU: bytes of KV read a second, as a share of the machine's measured read bandwidth.

    python benchmarks/attention.py [--threads N] [--sequences 64] [--context 1024] [--dtype bfloat16]

Compares flexrun's call with the ways torch offers (see TORCH_FORMS) on the same token-major slab, interleaved in one
run, each at its best round. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy
import torch
from torch.nn.functional import scaled_dot_product_attention

from flexrun import native
from flexrun.attention import Segments, attend
from flexrun.core import DTYPES

SHAPES = {  # name: (KV heads, query heads a KV head, head_dim)
    "GQA 4:1, 128": (8, 4, 128),
    "GQA 4:1, 64": (8, 4, 64),
    "GQA 3:1, 64": (3, 3, 64),
    "GQA 7:1, 128": (4, 7, 128),
    "GQA 2:1, 256": (4, 2, 256),
    "MHA, 128": (16, 1, 128),
    "MHA, 80": (32, 1, 80),
}


def sdpa_folded_each(query, keys, values, scale):
    """A call a sequence, the group in the place of the query positions: what flexrun does without its kernels."""
    for row in range(len(query)):
        key, value = (slab[row].transpose(0, 1)[None] for slab in (keys, values))
        scaled_dot_product_attention(query[row : row + 1], key, value, scale=scale)


def sdpa_folded_batch(query, keys, values, scale):
    scaled_dot_product_attention(query, keys.transpose(1, 2), values.transpose(1, 2), scale=scale)


def sdpa_unfolded(query, keys, values, scale):
    query = query.flatten(1, 2).unsqueeze(2)
    scaled_dot_product_attention(
        query, keys.transpose(1, 2), values.transpose(1, 2), scale=scale, enable_gqa=query.shape[1] != keys.shape[2]
    )


def matmuls(query, keys, values, scale):
    weights = (query @ keys.permute(0, 2, 3, 1)).mul_(scale).softmax(-1)
    weights @ values.transpose(1, 2)


# query [sequences, KV heads, group, D]; keys, values [sequences, tokens, KV heads, D]: equal lengths, no masks
TORCH_FORMS = {
    "sdpa_folded_each": sdpa_folded_each,
    "sdpa_folded_batch": sdpa_folded_batch,
    "sdpa_unfolded": sdpa_unfolded,
    "matmuls": matmuls,
}


def measure_shape(shape, sequences, context, dtype, rounds) -> dict[str, float]:
    """Best seconds of each form, and of reading as many bytes."""
    num_kv_heads, group, head_dim = shape
    slab = torch.randn(sequences * context, 2, num_kv_heads, head_dim).to(dtype)
    query = torch.randn(sequences, num_kv_heads * group, head_dim).to(dtype)
    out = torch.empty_like(query)
    starts = numpy.arange(sequences)
    segments = Segments(starts, numpy.ones(sequences), starts * context, numpy.full(sequences, context))
    scale = head_dim**-0.5
    folded = query.view(sequences, num_kv_heads, group, head_dim)
    keys, values = slab.view(sequences, context, 2, num_kv_heads, head_dim).unbind(2)
    plain = slab.view(-1).view(torch.float32)

    def call(form):
        return lambda: form(folded, keys, values, scale)

    ways = {"read": plain.sum}
    ways["flexrun"] = lambda: attend(query, slab[:, 0], slab[:, 1], segments, scale=scale, out=out)
    ways |= {name: call(form) for name, form in TORCH_FORMS.items()}
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(rounds):
        for name, way in ways.items():
            if name not in ("read", "flexrun") and turn >= max(2, rounds // 8):
                continue  # the slow ones need no more rounds
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best | {"bytes": slab.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024, help="KV rows of each sequence")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.sequences} sequences of {arguments.context} tokens, {arguments.dtype}, "
        f"{arguments.threads} threads, kernels: {native.instruction_set}, torch {torch.__version__}\n"
    )
    print(
        f"{'shape':14} {'read GB/s':>10} {'flexrun GB/s':>13} {'share':>6} {'best torch GB/s':>16} {'ratio':>6}  which"
    )
    results = {}
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            best = measure_shape(
                shape, arguments.sequences, arguments.context, DTYPES[arguments.dtype], arguments.rounds
            )
            rate = {way: best["bytes"] / seconds / 1e9 for way, seconds in best.items() if way != "bytes"}
            torch_best = max(TORCH_FORMS, key=rate.get)
            results[name] = {
                "gigabytes_per_second": rate,
                "share_of_read_bandwidth": rate["flexrun"] / rate["read"],
                "ratio_to_best_torch": rate["flexrun"] / rate[torch_best],
                "best_torch": torch_best,
            }
            print(
                f"{name:14} {rate['read']:10.1f} {rate['flexrun']:13.1f} {rate['flexrun'] / rate['read']:6.2f} "
                f"{rate[torch_best]:16.1f} {rate['flexrun'] / rate[torch_best]:6.1f}  {torch_best}",
                flush=True,
            )
    print()
    print(
        json.dumps(
            {"arguments": vars(arguments), "kernels": native.instruction_set, "torch": torch.__version__}
            | {"shapes": results}
        )
    )


if __name__ == "__main__":
    main()
