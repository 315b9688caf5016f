"""KV cache and weights on disk while the CPU attends: the rate of the disk lanes beside the disk's own direct rate.

    python benchmarks/make_checkpoint.py llama-1b MODEL_DIR
    python benchmarks/kv_on_disk.py --model MODEL_DIR --disk-dir DIR

Each round measures direct reads of a file as large as the KV cache, with as many requests in flight as the run may
have, then runs prompts to a few tokens and times each pass in which all sequences decode; medians are of
passes in which others took less than a tenth of the cores. --gpu-memory: beside an emulated accelerator, on which the
matmuls run while the host attends. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy
from comparison import QUIET_SHARE, print_table
from processes import MachineTimes, outside_use

from flexrun import LLM, SamplingParams
from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.disk_io import BLOCK_BYTES, DirectFile
from flexrun.offload.executor import THREADS
from flexrun.offload.tiers import Buffer
from flexrun.outputs import Request

REQUESTS_IN_FLIGHT = 2 * THREADS[Lane.DISK_READ]  # those of the weights and those of the KV cache
FILE_BYTES = 1 << 30  # at least, so that a measurement takes some tenths of a second
DISK_LANES = (Lane.DISK_READ.value, Lane.DISK_WRITE.value)


def direct_rate(folder: Path, nbytes: int, threads: int) -> float:
    """Bytes a second of direct reads of a new file of about ``nbytes``, in blocks, ``threads`` of them in flight."""
    blocks = -(-nbytes // BLOCK_BYTES)
    file, memory = DirectFile.nameless(folder, blocks * BLOCK_BYTES), Buffer.outside_budget(threads * BLOCK_BYTES)
    memory.data.random_()

    def move(call, thread: int) -> None:
        for block in range(thread, blocks, threads):
            call(memory.data.data_ptr() + thread * BLOCK_BYTES, block * BLOCK_BYTES, BLOCK_BYTES)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda thread: move(file.write_from, thread), range(threads)))
        start = time.perf_counter()
        list(pool.map(lambda thread: move(file.read_into, thread), range(threads)))
        seconds = time.perf_counter() - start
    if not file.direct:
        raise SystemExit(f"error: {folder} has no direct access")
    file.close()
    memory.close()
    return blocks * BLOCK_BYTES / seconds


def run(settings: argparse.Namespace, policy: Policy) -> dict:
    """Of each pass in which every sequence decodes: seconds, bytes of the disk lanes, use of the cores."""
    marks: list[tuple[float, dict, int, MachineTimes]] = []
    with LLM(
        settings.model,
        dtype="bfloat16",
        policy=policy,
        disk_dir=settings.disk_dir,
        gpu_memory=settings.gpu_memory,
        trace=settings.trace,
    ) as llm:
        generator = numpy.random.default_rng(0)
        highest = min(llm.spec.vocab_size, 30_000)
        prompts = [generator.integers(10, highest, settings.prompt_tokens).tolist() for _ in range(settings.sequences)]
        params = SamplingParams(temperature=0.0, max_tokens=settings.output_tokens, ignore_eos=True)

        def on_pass(prefilled: int, generated: int) -> None:
            marks.append((time.perf_counter(), llm.summary()["lanes"], prefilled, MachineTimes.now()))

        requests = [Request(str(number), token_ids=prompt, params=params) for number, prompt in enumerate(prompts)]
        list(llm.generate_iter(requests, on_pass=on_pass))
        account = llm.plan.layout.account
    first = max(number for number, mark in enumerate(marks) if mark[2])  # the last pass that prefills
    passes = []
    for before, after in pairwise(marks[first:]):
        seconds = after[0] - before[0]
        moved = {lane: bytes_of(after[1], lane) - bytes_of(before[1], lane) for lane in DISK_LANES}
        busy = after[1]["cpu"]["busy_seconds"] - before[1]["cpu"]["busy_seconds"]
        rates = {"bytes_per_second": sum(moved.values()) / seconds, "cpu_lane_share": busy / seconds}
        passes.append({"seconds": seconds, **moved, **rates, **outside_use(before[3], after[3])})
    return {"passes": passes, "disk_kv_bytes": account.bytes_by_kind[Tier.DISK]["kv"]}


def bytes_of(lanes: dict, lane: str) -> int:
    return lanes[lane]["bytes"] if lane in lanes else 0  # a lane without steps is not there


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--disk-dir", type=Path, required=True, help="packed weights and KV cache; on the disk to measure"
    )
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=17)
    parser.add_argument("--micro-batches", type=int, default=4, help="of attention")
    parser.add_argument("--weights-on-disk", type=float, default=0.5, metavar="SHARE")
    parser.add_argument("--kv-on-disk", type=float, default=1.0, metavar="SHARE")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of an emulated accelerator")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trace", metavar="FILE", help="timeline of the last round, in Chrome's trace format")
    parser.add_argument("--output", type=Path, help="write the JSON document here as well")
    settings = parser.parse_args()
    settings.disk_dir.mkdir(parents=True, exist_ok=True)
    policy = Policy(
        sequences_in_flight=settings.sequences,
        tokens_per_pass=min(settings.sequences * settings.prompt_tokens, 16384),
        attention_micro_batch=-(-settings.sequences // settings.micro_batches),
        weights=Placement(0.0, 1.0 - settings.weights_on_disk, settings.weights_on_disk),
        kv=Placement(0.0, 1.0 - settings.kv_on_disk, settings.kv_on_disk),
    )
    rounds, nbytes = [], FILE_BYTES
    for _ in range(settings.rounds):
        rates = {threads: direct_rate(settings.disk_dir, nbytes, threads) for threads in (3, REQUESTS_IN_FLIGHT)}
        result = run(settings, policy)
        nbytes = max(FILE_BYTES, result["disk_kv_bytes"])
        quiet = [each for each in result["passes"] if each["outside_cpu_share"] < QUIET_SHARE] or result["passes"]
        middle = {key: statistics.median(each[key] for each in quiet) for key in quiet[0]}
        share = middle["bytes_per_second"] / max(rates.values())
        rounds.append({**result, "direct": rates, "quiet": len(quiet), "median": middle, "share": share})
    rows = [
        (
            f"{each['quiet']} of {len(each['passes'])}",
            f"{each['median']['seconds']:.3f}",
            *(f"{each['median'][lane] / 1e6:.1f}" for lane in DISK_LANES),
            f"{each['median']['bytes_per_second'] / 1e9:.2f}",
            " / ".join(f"{rate / 1e9:.2f}" for rate in each["direct"].values()),
            f"{each['share']:.0%}",
            f"{each['median']['cpu_lane_share']:.0%}",
        )
        for each in rounds
    ]
    in_flight = " / ".join(map(str, rounds[0]["direct"]))
    head = ("quiet passes", "s a pass", "MB read", "MB written", "GB/s", f"direct GB/s, {in_flight} in flight")
    print_table(head, rows)
    share = statistics.median(each["share"] for each in rounds)
    print(f"  median {share:.0%} of the disk's direct rate")
    document = json.dumps({"model": str(settings.model), "share": share, "rounds": rounds})
    print(document)
    if settings.output is not None:
        settings.output.write_text(document + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
