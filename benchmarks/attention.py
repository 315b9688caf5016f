"""Decode attention on the CPU: bytes of KV read a second, beside the machine's read bandwidth and the forms of torch.

    python benchmarks/attention.py [--threads N] [--dtypes bfloat16] [--head-dims 128] [--rounds 9]

Every form gets the same KV slab, laid out and allocated as the engine does it and many times larger than the caches.
A round runs reading, ours and each form of torch after one another; figures are medians of the rounds, shares and
ratios medians of each round's own. Reading is torch's float32 sum of the slab, which a loop in C does not beat. The
last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexrun import native
from flexrun.attention import Segments, attend
from flexrun.core import DTYPES, Tier
from flexrun.hardware.identity import cpu_cache_bytes, machine_name
from flexrun.offload.tiers import MemoryTier

CACHES = 8  # the slab is at least so many times the largest cache
LEAST_BYTES = 256 << 20
SLOW_ROUNDS = 3  # of the forms of torch, which take long and do not come near


@dataclass(frozen=True)
class Case:
    """kv_heads each have ``group`` query heads. lengths: of the sequences, around ``context``."""

    dtype: str = "bfloat16"
    head_dim: int = 128
    kv_heads: int = 8
    group: int = 4
    context: int = 1024
    ragged: bool = False
    threads: int = 0

    @property
    def name(self) -> str:
        words = f"{self.dtype} {self.head_dim}"
        words += f", {self.kv_heads} heads of {self.group}" * (self.group != 4)
        words += f", context {self.context}" * (self.context != 1024)
        return words + ", ragged lengths" * self.ragged + f", {self.threads} thread" * (self.threads == 1)

    @property
    def lengths(self) -> numpy.ndarray:
        """KV rows of each sequence, together as many as the caches ask for."""
        row_bytes = 2 * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize
        tokens = max(LEAST_BYTES, CACHES * cpu_cache_bytes()) // row_bytes
        count = max(tokens // self.context, 1)
        if not self.ragged:
            return numpy.full(count, self.context)
        return numpy.random.default_rng(0).integers(1, 2 * self.context, count)


# The forms of torch. query [sequences, KV heads, group, D]; keys, values [sequences, tokens, KV heads, D] -----------


def sdpa_folded(query, keys, values, scale):
    """The group in the place of the query positions."""
    scaled_dot_product_attention(query, keys.transpose(1, 2), values.transpose(1, 2), scale=scale)


def sdpa_folded_each(query, keys, values, scale):
    """A call a sequence: what flexrun does without its kernels, and what ragged lengths ask for."""
    for row in range(len(query)):
        sdpa_folded(query[row : row + 1], keys[row : row + 1], values[row : row + 1], scale)


def sdpa_grouped(query, keys, values, scale):
    scaled_dot_product_attention(
        query.flatten(1, 2).unsqueeze(2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        scale=scale,
        enable_gqa=query.shape[2] > 1,
    )


def sdpa_expanded(query, keys, values, scale):
    """Every query head sees its KV head through a view."""
    sequences, kv_heads, group, head_dim = query.shape
    keys, values = (
        slab.transpose(1, 2).unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for slab in (keys, values)
    )
    scaled_dot_product_attention(query.view(sequences, kv_heads * group, 1, head_dim), keys, values, scale=scale)


def sdpa_float32(query, keys, values, scale):
    sdpa_folded(query.float(), keys.float(), values.float(), scale)


def matmuls(query, keys, values, scale):
    weights = (query @ keys.permute(0, 2, 3, 1)).mul_(scale).softmax(-1)
    weights @ values.transpose(1, 2)


def matmuls_each(query, keys, values, scale):
    """A call a sequence: its KV is still in the caches for the second product."""
    for row in range(len(query)):
        matmuls(query[row : row + 1], keys[row : row + 1], values[row : row + 1], scale)


def matmuls_float32_each(query, keys, values, scale):
    for row in range(len(query)):
        matmuls(*(tensor[row : row + 1].float() for tensor in (query, keys, values)), scale)


FORMS = {
    form.__name__: form
    for form in (
        sdpa_folded,
        sdpa_folded_each,
        sdpa_grouped,
        sdpa_expanded,
        sdpa_float32,
        matmuls,
        matmuls_each,
        matmuls_float32_each,
    )
}
EACH = ("sdpa_folded_each", "matmuls_each", "matmuls_float32_each")  # those that ragged lengths allow


def measure(case: Case, rounds: int) -> dict:
    """Medians of a case: bytes a second of reading, ours and torch's best, shares and ratios."""
    dtype, lengths = DTYPES[case.dtype], case.lengths
    tokens, sequences = int(lengths.sum()), len(lengths)
    shape = (2, tokens, case.kv_heads, case.head_dim)
    buffer = MemoryTier(Tier.CPU, None).allocate("kv", dtype.itemsize * 2 * tokens * shape[2] * shape[3], touch=True)
    slab = buffer.view(0, shape, dtype)
    block = torch.randn(2, 1024, *shape[2:]).to(dtype)
    for start in range(0, tokens, 1024):
        slab[:, start : start + 1024] = block[:, : tokens - start]
    query = torch.randn(sequences, case.kv_heads * case.group, case.head_dim).to(dtype)
    out, starts = torch.empty_like(query), numpy.cumsum(lengths) - lengths
    segments = Segments(numpy.arange(sequences), numpy.ones(sequences), starts, lengths)
    folded = query.view(sequences, case.kv_heads, case.group, case.head_dim)
    scale = case.head_dim**-0.5
    words = buffer.data[: buffer.data.numel() // 4 * 4].view(torch.float32)
    ways: dict[str, Callable[[], object]] = {
        "read": words.sum,
        "flexrun": lambda: attend(query, slab[0], slab[1], segments, scale=scale, out=out),
    }
    for name, form in FORMS.items():
        if not case.ragged or name in EACH:
            ways[name] = _torch_call(form, folded, slab, lengths, scale)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, way in ways.items():
            if name in FORMS and turn >= SLOW_ROUNDS:
                continue
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    buffer.close()
    nbytes = slab.nbytes
    rates = {name: nbytes / statistics.median(each) for name, each in seconds.items()}
    best = max((name for name in FORMS if name in rates), key=rates.get)
    return {
        "case": case.name,
        **asdict(case),
        "kv_bytes": nbytes,
        "sequences": sequences,
        "bytes_per_second": rates,
        "share_of_read_bandwidth": _median_ratio(seconds["read"], seconds["flexrun"]),
        "best_torch": best,
        "ratio_to_best_torch": _median_ratio(seconds[best], seconds["flexrun"]),
    }


def _torch_call(form, folded: Tensor, slab: Tensor, lengths: numpy.ndarray, scale: float) -> Callable[[], object]:
    if (lengths == lengths[0]).all():
        keys, values = slab.unflatten(1, (len(lengths), int(lengths[0])))
        return lambda: form(folded, keys, values, scale)
    parts = list(zip(folded.split(1), *(plane.split(lengths.tolist()) for plane in slab)))
    return lambda: [form(query, keys[None], values[None], scale) for query, keys, values in parts]


def _median_ratio(others: list[float], ours: list[float]) -> float:
    """How many times as fast as the other we were, round by round."""
    return statistics.median(other / own for other, own in zip(others, ours))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["bfloat16", "float16", "float32"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 80, 96, 128, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--plain", action="store_true", help="leave out other lengths, groups and numbers of threads")
    arguments = parser.parse_args()
    cases = [Case(dtype, head_dim) for dtype in arguments.dtypes for head_dim in arguments.head_dims]
    if not arguments.plain:
        cases += [
            Case(context=1001),
            Case(context=63),
            Case(ragged=True),
            Case(kv_heads=16, group=1),
            Case(kv_heads=4, group=7),
            Case(threads=1),
            Case("float32", threads=1),
        ]
    print(
        f"{machine_name()}, {arguments.threads} threads, kernels: {native.instruction_set}, torch {torch.__version__}; "
        f"8 KV heads of 4 query heads, context 1024, unless said\n"
    )
    print(f"{'case':38} {'read GB/s':>9} {'ours GB/s':>9} {'share':>6} {'torch GB/s':>10} {'ratio':>6}  its best form")
    results = []
    with torch.inference_mode():
        for case in cases:
            torch.set_num_threads(case.threads or arguments.threads)
            result = measure(case, arguments.rounds)
            results.append(result)
            rates = {name: rate / 1e9 for name, rate in result["bytes_per_second"].items()}
            print(
                f"{result['case']:38} {rates['read']:9.1f} {rates['flexrun']:9.1f} "
                f"{result['share_of_read_bandwidth']:6.2f} {rates[result['best_torch']]:10.1f} "
                f"{result['ratio_to_best_torch']:6.1f}  {result['best_torch']}",
                flush=True,
            )
    document = {"threads": arguments.threads, "kernels": native.instruction_set, "torch": torch.__version__}
    print("\n" + json.dumps(document | {"machine": machine_name(), "load": os.getloadavg(), "cases": results}))


if __name__ == "__main__":
    main()
