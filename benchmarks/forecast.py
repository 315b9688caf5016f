"""Forecast beside measurement: runs placements of all kinds on this machine and prints how far each forecast was off.

    python benchmarks/make_checkpoint.py llama-1b MODEL_DIR
    python benchmarks/forecast.py --model MODEL_DIR --cache-dir DIR [--profile] [--rounds 1]

Every run plans first, so each forecast is made before its measurement; all prompts run to their last token. The second
half of the table compares the plan's memory account with the peak of each tier. --profile measures the machine anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from flexrun import LLM, Hardware, SamplingParams
from flexrun.core import Tier
from flexrun.hardware.saved import profile_path

SMALL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Case:
    """One run. large: the --model, else SmolLM2. settings: arguments of LLM, policies among them as fields."""

    name: str
    large: bool
    sequences: int
    prompt_tokens: int
    output_tokens: int
    settings: dict = field(default_factory=dict)


def weights_on_disk(sequences: int) -> dict:
    placement = {"gpu": 0.0, "cpu": 0.0, "disk": 1.0}
    return {"sequences_in_flight": sequences, "attention_micro_batch": sequences, "weights": placement}


def three_tiers(sequences: int, share: float, gpu: float = 0.2, cpu: float = 0.4, newest: float = 0.0) -> dict:
    """Weights on all tiers, KV in RAM in two micro-batches, of which ``share`` are attended on the CPU's own lane, but
    for the ``newest`` share of each sequence's tokens."""
    policy = {
        "sequences_in_flight": sequences,
        "attention_micro_batch": sequences // 2,
        "weights": {"gpu": gpu, "cpu": cpu, "disk": round(1 - gpu - cpu, 6)},
        "cpu_attention_share": share,
        "kv_device_tokens_share": newest,
    }
    return {"policy": policy, "gpu_memory": "3GiB"}


CASES = (
    Case("in RAM, short prompts", True, 64, 64, 24),
    Case("in RAM, long prompts", True, 8, 1000, 16),
    Case("in RAM, few sequences", True, 4, 64, 48),
    Case("in RAM, small model", False, 256, 128, 32),
    Case("in RAM, small model, long prompts", False, 24, 1500, 24),
    Case("disk, all weights, few sequences", True, 8, 64, 16, {"policy": weights_on_disk(8)}),
    Case("disk, all weights, long prompts", True, 6, 1000, 8, {"policy": weights_on_disk(6)}),
    Case("disk, budget of 1 GiB", True, 48, 64, 24, {"cpu_memory": "1GiB"}),
    Case("disk, budget of 1.5 GiB, long prompts", True, 8, 1000, 12, {"cpu_memory": "1.5GiB"}),
    Case("three tiers, KV on the accelerator", True, 32, 64, 16, {"gpu_memory": "1GiB", "cpu_memory": "1GiB"}),
    Case("three tiers, half of the KV on the CPU", True, 32, 128, 12, three_tiers(32, 0.5)),
    Case("three tiers, all KV on the CPU", True, 32, 128, 12, three_tiers(32, 1.0)),
    Case("three tiers, newest half of the KV on the accelerator", True, 32, 128, 12, three_tiers(32, 1.0, newest=0.5)),
    Case("three tiers, KV copied, long prompts", True, 6, 800, 8, three_tiers(6, 0.0)),
    Case("two tiers, small model", False, 128, 128, 16, {"gpu_memory": "150MiB", "cpu_memory": "4GiB"}),
)


def run(case: Case, model: str, cache_dir: str, hardware: Hardware, folder: Path) -> dict:
    """Plan and run one case; its forecast, its measurement, and account and peak of each tier."""
    settings = dict(case.settings)
    if "policy" in settings:
        settings["policy"] = folder / "policy.json"
        settings["policy"].write_text(json.dumps(case.settings["policy"]))
    generator = numpy.random.default_rng(0)
    with LLM(
        model if case.large else SMALL, dtype="bfloat16", cache_dir=cache_dir, hardware=hardware, **settings
    ) as llm:
        highest = min(llm.spec.vocab_size, 30_000)
        prompts = [generator.integers(10, highest, case.prompt_tokens).tolist() for _ in range(case.sequences)]
        params = SamplingParams(temperature=0.0, max_tokens=case.output_tokens, ignore_eos=True)
        llm.generate(prompts, params, use_tqdm=False)
        summary, plan = llm.summary(), llm.plan
    came, planned = summary["forecast"]["as_it_came"], summary["forecast"]["planned"]
    return {
        "case": case.name,
        "work": f"{case.sequences} x {case.prompt_tokens}+{case.output_tokens}",
        "forecast_seconds": planned["seconds"],
        "measured_seconds": summary["seconds"],
        "error": planned["seconds"] / summary["seconds"] - 1.0,
        "prefill_error": came["prefill_seconds"] / summary["prefill_seconds"] - 1.0,
        "decode_error": came["decode_seconds"] / summary["decode_seconds"] - 1.0,
        "binding_lane": came["binding_lane"],
        "share_of_bound": summary["forecast"]["share_of_bound"],
        "account_over_peak": {
            tier: plan.layout.account.total(Tier(tier)) / each["peak_bytes"] for tier, each in summary["tiers"].items()
        },
        "policy": summary["policy"],
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| case | sequences x prompt+output | forecast s | measured s | error | bound | of bound | account / peak |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        account = ", ".join(f"{tier} {share:.3f}" for tier, share in row["account_over_peak"].items())
        lines.append(
            f"| {row['case']} | {row['work']} | {row['forecast_seconds']:.1f} | {row['measured_seconds']:.1f} "
            f"| {row['error']:+.1%} | {row['binding_lane']} | {row['share_of_bound']:.0%} | {account} |"
        )
    errors = [abs(row["error"]) for row in rows]
    shares = [abs(share - 1.0) for row in rows for share in row["account_over_peak"].values()]
    lines.append("")
    lines.append(f"median error {statistics.median(errors):.1%}, largest {max(errors):.1%}, over {len(rows)} runs;")
    lines.append(f"account off by at most {max(shares):.2%} of a tier's peak")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the large model")
    parser.add_argument("--cache-dir", required=True, help="packed weights and the profile; on the disk to measure")
    parser.add_argument("--profile", action="store_true", help="measure the machine first, within a minute")
    parser.add_argument("--rounds", type=int, default=1, help="repeat all cases; the table has medians by case")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows, as JSON")
    arguments = parser.parse_args()
    path = profile_path(arguments.cache_dir)
    if arguments.profile or not path.exists():
        Hardware.measure(arguments.cache_dir, progress=True).save(path)
    hardware = Hardware.load(path)
    cases = [case for case in CASES if not arguments.only or arguments.only in case.name]
    rows: dict[str, list[dict]] = {case.name: [] for case in cases}
    for number in range(arguments.rounds):
        for case in cases:
            row = run(case, arguments.model, arguments.cache_dir, hardware, Path(arguments.cache_dir))
            rows[case.name].append(row)
            print(
                f"round {number + 1}: {case.name}: forecast {row['forecast_seconds']:.1f} s, measured "
                f"{row['measured_seconds']:.1f} s ({row['error']:+.1%}; prefill {row['prefill_error']:+.1%}, decode "
                f"{row['decode_error']:+.1%})",
                file=sys.stderr,
                flush=True,
            )
    middle = [sorted(each, key=lambda row: row["measured_seconds"])[len(each) // 2] for each in rows.values()]
    print(f"{hardware.name}; profile of {hardware.measured}\n")
    print(table(middle))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"hardware": json.loads(hardware.to_json()), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
