"""A model of 16-, 8- and 4-bit weights on the same prompts: how many times as fast, and how far off the forecasts are.

    python benchmarks/make_checkpoint.py llama-1b MODEL_DIR
    python benchmarks/four_bits.py --model MODEL_DIR --sequences 1 64
    python benchmarks/four_bits.py --model MODEL_DIR --sequences 8 --memory-limit 900MB --cpu-memory 400MiB
    python benchmarks/four_bits.py --model MODEL_DIR --bits 16 8 w8a8 w4a8 --sequences 64

Every run is a process of its own that loads, warms up and then repeats the workload; the bits take turns, so that a
slow minute hurts them all. Ratios are those of medians. --memory-limit: in a control group of that size, page
cache included (root). The weights are packed before. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

from comparison import print_table
from cpu_vs_peers import DEFAULT_CACHE, size_in_bytes
from processes import end_on_terminate, flags, run_json, say, worker_command

KINDS = {
    "16": {},
    "8": {"weight_bits": 8},
    "4": {"weight_bits": 4},
    "w8a8": {"weight_bits": 8, "activation_bits": 8},
    "w4a8": {"weight_bits": 4, "activation_bits": 8},
}


def one_run(settings: argparse.Namespace) -> None:
    """What a child does: prints the measurement as JSON."""
    from flexrun import LLM
    from flexrun.evals.throughput import Cell, measure

    (sequences,), (kind,) = settings.sequences, settings.bits
    cell = Cell("four bits", sequences, settings.prompt_tokens, settings.output_tokens)
    options = {"hardware": settings.hardware, "cpu_memory": settings.cpu_memory, "disk_dir": settings.disk_dir}
    with LLM(settings.model, dtype="bfloat16", **KINDS[kind], **options) as llm:
        (found,) = measure(llm, [cell], repetitions=settings.repetitions)
        policy = dataclasses.asdict(llm.plan.policy)
        forecast = llm.plan.forecast
        given = {"forecast_decode_seconds": forecast.decode_seconds, "weights": policy["weights"]}
    print(json.dumps({**dataclasses.asdict(found), **given}))


def measured(settings: argparse.Namespace, sequences: int) -> dict[str, list[dict]]:
    """The runs of each kind, in turns."""
    runs = {bits: [] for bits in settings.bits}
    given = {
        "model": settings.model,
        "sequences": sequences,
        "prompt_tokens": settings.prompt_tokens,
        "output_tokens": settings.output_tokens,
        "cpu_memory": settings.cpu_memory,
        "disk_dir": settings.disk_dir,
        "hardware": settings.hardware,
        "repetitions": settings.repetitions,
    }
    for number in range(settings.rounds):
        for bits in settings.bits:
            say(f"{sequences} sequences, {bits} bits, round {number + 1}")
            command = worker_command(sys.executable, Path(__file__).name, "--child", *flags({**given, "bits": bits}))
            runs[bits].append(run_json(command, limit_bytes=settings.memory_limit))
    return runs


def summed_up(runs: dict[str, list[dict]]) -> list[dict]:
    """Of each kind the medians over its runs, and how many times the first one's speed that is."""
    rows = []
    for bits, own in runs.items():
        names = ("seconds", "decode_per_second", "prefill_per_second", "forecast_seconds")
        medians = {name: statistics.median(run[name] for run in own) for name in names}
        row = {"bits": bits, **medians, "forecast_error": medians["forecast_seconds"] / medians["seconds"] - 1}
        first = rows[0] if rows else row
        row["speed"] = first["seconds"] / row["seconds"]
        row["decode_speed"] = row["decode_per_second"] / first["decode_per_second"]
        row["outside_cpu_share"] = max(run["outside_cpu_share"] for run in own)
        rows.append(row)
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_CACHE / "llama-1b", metavar="DIR")
    parser.add_argument(
        "--bits",
        choices=KINDS,
        nargs="+",
        default=["16", "8", "4"],
        metavar="KIND",
        help=f"of {', '.join(KINDS)}, the last with activations in 8 bits; the first is what others are compared to",
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--repetitions", type=int, default=2, help="of the workload in a run, after one that warms up")
    parser.add_argument("--memory-limit", type=size_in_bytes, help="of a control group around each run, as in 1.5GB")
    parser.add_argument("--cpu-memory", metavar="SIZE", help="flexrun's budget")
    parser.add_argument("--disk-dir", type=Path, metavar="DIR", help="packed weights")
    parser.add_argument(
        "--hardware", type=Path, metavar="FILE", help="profile to forecast by (default: this machine's)"
    )
    parser.add_argument("--output", type=Path, help="write the JSON document here as well")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    settings = build_parser().parse_args()
    if settings.child:
        one_run(settings)
        return 0
    end_on_terminate()
    from flexrun import LLM

    for kind in settings.bits:
        with LLM(settings.model, dtype="bfloat16", **KINDS[kind], disk_dir=settings.disk_dir) as llm:
            llm.pack()
    document = {"model": str(settings.model), "workloads": []}
    for sequences in settings.sequences:
        runs = measured(settings, sequences)
        rows = summed_up(runs)
        document["workloads"].append({"sequences": sequences, "medians": rows, "runs": runs})
        print(f"{sequences} x ({settings.prompt_tokens} + {settings.output_tokens})")
        table = [
            (
                row["bits"],
                f"{row['seconds']:.2f}",
                f"{row['forecast_seconds']:.2f} ({row['forecast_error']:+.0%})",
                f"{row['prefill_per_second']:.0f}",
                f"{row['decode_per_second']:.1f}",
                f"{row['speed']:.2f}",
                f"{row['decode_speed']:.2f}",
                f"{row['outside_cpu_share']:.0%}",
            )
            for row in rows
        ]
        head = ("bits", "seconds", "forecast", "prefill/s", "decode/s", "speed", "decoding", "others' CPU")
        print_table(head, table)
    print(json.dumps(document))
    if settings.output is not None:
        settings.output.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
