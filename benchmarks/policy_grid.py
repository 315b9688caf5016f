"""The searched policy against policies that a careful person would try by hand, each measured.

    python benchmarks/make_checkpoint.py llama-1b MODEL_DIR
    python benchmarks/policy_grid.py --model MODEL_DIR --cache-dir DIR [--setting disk|emulated] [--rounds 2]

All run the same job within the same budgets, in turn; the table has the median of the rounds. A hand-made policy that
does not fit the budgets is said to, and counts as slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy

from flexrun import LLM, Hardware, SamplingParams
from flexrun.errors import BudgetError
from flexrun.hardware.saved import profile_path


def placement(gpu: float, cpu: float) -> dict:
    return {"gpu": gpu, "cpu": cpu, "disk": round(1.0 - gpu - cpu, 6)}


def by_hand(sequences: int, weights: dict, tokens: int = 2048, micro_batches: int = 1, **fields) -> dict:
    return {
        "sequences_in_flight": sequences,
        "tokens_per_pass": tokens,
        "attention_micro_batch": -(-sequences // micro_batches),
        "weights": weights,
        **fields,
    }


ALL_GPU = placement(1.0, 0.0)
SETTINGS = {
    "disk": {
        "budgets": {"cpu_memory": "1.2GiB"},
        "job": (64, 128, 12),
        "policies": {
            "8 sequences, half in RAM": by_hand(8, placement(0, 0.5)),
            "16 sequences, 40 % in RAM": by_hand(16, placement(0, 0.4)),
            "32 sequences, 40 % in RAM": by_hand(32, placement(0, 0.4)),
            "32 sequences, 20 % in RAM": by_hand(32, placement(0, 0.2)),
            "48 sequences, 20 % in RAM": by_hand(48, placement(0, 0.2)),
            "64 sequences, 20 % in RAM": by_hand(64, placement(0, 0.2)),
            "64 sequences, none in RAM": by_hand(64, placement(0, 0.0)),
            "64 sequences, 20 % in RAM, passes of 512": by_hand(64, placement(0, 0.2), 512),
            "64 sequences, 10 % in RAM, passes of 8192": by_hand(64, placement(0, 0.1), 8192),
            "64 sequences, 20 % in RAM, rows of 256": by_hand(64, placement(0, 0.2), token_micro_batch=256),
        },
    },
    "emulated": {
        "budgets": {"gpu_memory": "1GiB", "cpu_memory": "3GiB"},
        "job": (48, 64, 8),
        "policies": {
            "KV on the GPU, 16 sequences": by_hand(16, placement(0.2, 0.8), 512, 2, kv=ALL_GPU),
            "KV on the GPU, 48 sequences": by_hand(48, placement(0.0, 1.0), 512, 2, kv=ALL_GPU),
            "KV on the GPU, 24 sequences, 10 % resident": by_hand(24, placement(0.1, 0.9), 512, 2, kv=ALL_GPU),
            "CPU attention, 48 sequences": by_hand(48, placement(0.2, 0.8), 512, 2, cpu_attention_share=1.0),
            "CPU attention, 48 sequences, 4 micro-batches": by_hand(48, placement(0.2, 0.8), 512, 4),
            "half CPU attention, 48 sequences": by_hand(48, placement(0.2, 0.8), 512, 2, cpu_attention_share=0.5),
            "KV copied, 48 sequences": by_hand(48, placement(0.2, 0.8), 512, 4, cpu_attention_share=0.0),
            "KV copied, passes of 2048": by_hand(48, placement(0.1, 0.9), 2048, 4, cpu_attention_share=0.0),
            "CPU attention, 48 sequences, passes of 2048": by_hand(48, placement(0.1, 0.9), 2048, 2),
            "CPU attention, 24 sequences": by_hand(24, placement(0.25, 0.75), 512, 2),
        },
    },
}
SEARCHED = "searched"


def measure(policy: Path | str, setting: dict, model: str, cache_dir: str, hardware: Hardware) -> tuple[float, dict]:
    """(generated tokens a second, the policy that ran)."""
    sequences, prompt_tokens, output_tokens = setting["job"]
    generator = numpy.random.default_rng(0)
    prompts = [generator.integers(10, 30_000, prompt_tokens).tolist() for _ in range(sequences)]
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    with LLM(
        model, dtype="bfloat16", policy=policy, cache_dir=cache_dir, hardware=hardware, **setting["budgets"]
    ) as llm:
        llm.generate(prompts, params, use_tqdm=False)
        summary = llm.summary()
    return summary["generated_tokens_per_second"], summary["policy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="disk")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.setting]
    hardware = Hardware.load(profile_path(arguments.cache_dir))
    document = Path(arguments.cache_dir) / "policy.json"
    rates: dict[str, list[float]] = {}
    for number in range(arguments.rounds):
        for name, fields in {SEARCHED: None, **setting["policies"]}.items():
            if fields is not None:
                document.write_text(json.dumps(fields))
            try:
                rate, ran = measure(
                    "auto" if fields is None else document, setting, arguments.model, arguments.cache_dir, hardware
                )
            except BudgetError as error:
                print(f"{name}: does not fit: {error.message}", file=sys.stderr, flush=True)
                continue
            rates.setdefault(name, []).append(rate)
            print(f"round {number + 1}: {name}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
            if fields is None:
                print(f"  {json.dumps(ran)}", file=sys.stderr, flush=True)
    medians = {name: statistics.median(each) for name, each in rates.items()}
    print(f"{arguments.setting}: {setting['budgets']}, job {setting['job']}\n")
    print("| policy | tokens/s | searched / this |\n|---|---|---|")
    for name, rate in sorted(medians.items(), key=lambda pair: -pair[1]):
        print(f"| {name} | {rate:.1f} | {medians[SEARCHED] / rate:.2f} |")


if __name__ == "__main__":
    main()
