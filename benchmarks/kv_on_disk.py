"""Weights and KV cache on disk while the CPU attends: the rate of the reads beside the disk's own direct rate.

    python benchmarks/make_checkpoint.py llama-1b MODEL_DIR
    python benchmarks/kv_on_disk.py --model MODEL_DIR --disk-dir DIR

Once all sequences decode, groups of passes take turns with direct reads of the same weights, which have the same size
and as many in flight, for the rate of a disk wanders. Between the two all that can be read ahead is waited for. A group
counts what it reads until its last pass ends, but not the last block of KV of a sequence, which waits in RAM.
--gpu-memory: beside an emulated accelerator, on which the matmuls run while the host attends. The last line of stdout
is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
from flexrun.placement import kv_block_bytes

REQUESTS_IN_FLIGHT = THREADS[Lane.DISK_READ]
DIRECT_SECONDS = 0.5
IDLE_SECONDS = 0.05  # without a read, after which all is there that fits
READ, WRITE = Lane.DISK_READ.value, Lane.DISK_WRITE.value


class DirectReads:
    """Reads of files past the page cache, one after the other, over and over."""

    def __init__(self, paths: Iterable[Path]):
        files = [DirectFile(path) for path in paths]
        if not all(file.direct for file in files):
            raise SystemExit(f"error: {files[0].path.parent} has no direct access")
        blocks = [
            (file, offset)
            for file in files
            for offset in range(0, file.path.stat().st_size - BLOCK_BYTES + 1, BLOCK_BYTES)
        ]
        self._blocks = itertools.cycle(blocks)
        self._memory = Buffer.outside_budget(REQUESTS_IN_FLIGHT * BLOCK_BYTES)

    def bytes_per_second(self) -> float:
        start = time.perf_counter()

        def read(thread: int) -> int:
            address, moved = self._memory.data.data_ptr() + thread * BLOCK_BYTES, 0
            while time.perf_counter() - start < DIRECT_SECONDS:
                file, offset = next(self._blocks)
                file.read_into(address, offset, BLOCK_BYTES)
                moved += BLOCK_BYTES
            return moved

        with ThreadPoolExecutor(REQUESTS_IN_FLIGHT) as pool:
            moved = sum(pool.map(read, range(REQUESTS_IN_FLIGHT)))
        return moved / (time.perf_counter() - start)


class Groups:
    """Measures groups of ``passes`` passes that decode, and the disk before and after each."""

    def __init__(self, llm: LLM, passes: int):
        self.results: list[dict] = []
        self._llm, self._passes = llm, passes
        self._count = 0
        self._begun: tuple[float, dict, MachineTimes] | None = None
        self._direct: DirectReads | None = None
        self._rate = 0.0

    def on_pass(self, prefilled: int, _: int) -> None:
        if prefilled:
            return
        self._count += 1
        if self._count % self._passes == 0:
            ended = self._now()
            if self._direct is None:
                self._direct = DirectReads(sorted(self._llm._packed.folder.glob("layer-*.bin")))
            self._wait_for_reads()
            rate = self._direct.bytes_per_second()
            if self._begun is not None:
                self._keep(self._begun, ended, (self._rate + rate) / 2)
            self._rate, self._begun = rate, self._now()

    def _now(self) -> tuple[float, dict, MachineTimes]:
        return time.perf_counter(), self._llm.summary()["lanes"], MachineTimes.now()

    def _wait_for_reads(self) -> None:
        before = -1
        while (moved := amount(self._now()[1], READ)) != before:
            before = moved
            time.sleep(IDLE_SECONDS)

    def _keep(self, begun: tuple, ended: tuple, direct: float) -> None:
        seconds = ended[0] - begun[0]
        read, written = (amount(ended[1], lane) - amount(begun[1], lane) for lane in (READ, WRITE))
        read -= self._passes * self._bytes_in_ram()
        busy = {
            f"{lane}_share": (amount(ended[1], lane, "busy_seconds") - amount(begun[1], lane, "busy_seconds")) / seconds
            for lane in (READ, WRITE, Lane.CPU.value)
        }
        outside = outside_use(begun[2], ended[2])
        times = {"seconds_per_pass": seconds / self._passes, "bytes_per_second": read / seconds, "direct": direct}
        share = {"share": read / seconds / direct}
        self.results.append({"read_bytes": read, "written_bytes": written, **times, **share, **busy, **outside})

    def _bytes_in_ram(self) -> int:
        """Of the KV that a pass reads, at most."""
        layout = self._llm.plan.layout
        on_disk = sum(place.home is Tier.DISK for place in layout.micro_batches)
        return on_disk * layout.policy.attention_micro_batch * layout.spec.num_layers * kv_block_bytes(layout.spec)


def amount(lanes: dict, lane: str, what: str = "bytes") -> float:
    return lanes.get(lane, {}).get(what, 0)  # a lane without steps is not there


def run(settings: argparse.Namespace, policy: Policy) -> list[dict]:
    """Of each group of passes: what it read, in what time, and what the disk could do meanwhile."""
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
        tokens = (settings.rounds + 1) * settings.passes + 3  # the last passes read nothing ahead
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        groups = Groups(llm, settings.passes)
        requests = [Request(str(number), token_ids=prompt, params=params) for number, prompt in enumerate(prompts)]
        list(llm.generate_iter(requests, on_pass=groups.on_pass))
    return groups.results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--disk-dir", type=Path, required=True, help="packed weights and KV cache; on the disk to measure"
    )
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--micro-batches", type=int, default=4, help="of attention")
    parser.add_argument("--weights-on-disk", type=float, default=0.5, metavar="SHARE")
    parser.add_argument("--kv-on-disk", type=float, default=1.0, metavar="SHARE")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of an emulated accelerator")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--passes", type=int, default=3, help="of a round")
    parser.add_argument("--trace", metavar="FILE", help="timeline, in Chrome's trace format")
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
    rounds = run(settings, policy)
    rows = [
        (
            f"{each['seconds_per_pass']:.3f}",
            *(f"{each[what] / settings.passes / 1e6:.1f}" for what in ("read_bytes", "written_bytes")),
            *(f"{each[what] / 1e9:.2f}" for what in ("bytes_per_second", "direct")),
            *(f"{each[what]:.0%}" for what in ("share", "disk_read_share", "disk_write_share", "cpu_share")),
            "" if each["outside_cpu_share"] < QUIET_SHARE else f"{each['outside_cpu_share']:.0%} used by others",
        )
        for each in rounds
    ]
    head = ("s a pass", "MB read", "MB written", "GB/s", "direct GB/s", "share", "reading", "writing", "computing", "")
    print_table(head, rows)
    quiet = [each for each in rounds if each["outside_cpu_share"] < QUIET_SHARE] or rounds
    share = statistics.median(each["share"] for each in quiet)
    print(
        f"  median of {len(quiet)} quiet rounds: {share:.1%} of the disk's direct rate, {REQUESTS_IN_FLIGHT} in flight"
    )
    document = json.dumps({"model": str(settings.model), "share": share, "rounds": rounds})
    print(document)
    if settings.output is not None:
        settings.output.write_text(document + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
