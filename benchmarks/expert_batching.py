"""Module-based batching beside one batch size for all modules, on an emulated accelerator behind a slow link.

    python benchmarks/make_checkpoint.py mixtral-1b MODEL_DIR
    python benchmarks/expert_batching.py --model MODEL_DIR --cache-dir DIR [--link 2GB] [--shared 16]

The same engine twice, weights in RAM: with all sequences in one pass, whose attention goes by micro-batches of --shared
sequences and whose experts take all tokens; and with only --shared sequences in flight, so that every module, experts
included, sees the tokens of one micro-batch. Each forecast is made before its run. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from pathlib import Path

from cpu_vs_peers import FIRST_PROMPT_TOKEN, size_in_bytes
from processes import say

from flexrun import LLM, Hardware, Policy, SamplingParams
from flexrun.config import Placement
from flexrun.hardware import Transfer
from flexrun.llm.machine_profile import settle_hardware


def policies(settings: argparse.Namespace) -> dict[str, Policy]:
    shared, everything = settings.shared, settings.sequences
    common = {"attention_micro_batch": shared, "weights": Placement(0, 1, 0), "kv": Placement(1, 0, 0)}
    return {
        "by module": Policy(
            sequences_in_flight=everything,
            tokens_per_pass=everything * settings.prompt_tokens,
            token_micro_batch=512,
            expert_batch=256,
            **common,
        ),
        "one size": Policy(
            sequences_in_flight=shared,
            tokens_per_pass=shared * settings.prompt_tokens,
            token_micro_batch=512,
            expert_batch=256,
            **common,
        ),
    }


def run(policy: Policy, prompts: list[list[int]], settings: argparse.Namespace, hardware: Hardware) -> dict:
    params = SamplingParams(temperature=0, max_tokens=settings.output_tokens, ignore_eos=True)
    options = {"gpu_memory": settings.gpu_memory, "lane_bandwidths": {"h2d": settings.link}, "hardware": hardware}
    with LLM(settings.model, policy=policy, disk_dir=settings.cache_dir / "packed", **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        summary = llm.summary()
    forecast = summary["forecast"]["planned"]
    return {
        "seconds": summary["seconds"],
        "tokens_per_second": summary["generated_tokens"] / summary["seconds"],
        "passes": summary["passes"],
        "forecast_seconds": forecast["seconds"],
        "forecast_error": forecast["seconds"] / summary["seconds"] - 1,
        "link_busy_seconds": summary["lanes"]["h2d"]["busy_seconds"],
        "link_bytes": summary["lanes"]["h2d"]["bytes"],
        "token_ids": [output.outputs[0].token_ids for output in outputs],
    }


def arguments(description: str, sequences: int) -> argparse.ArgumentParser:
    """What a run on an emulated accelerator is told; ``sequences`` prompts unless said otherwise."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--cache-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--link", type=size_in_bytes, default=2_000_000_000, help="bytes a second to the accelerator")
    parser.add_argument("--gpu-memory", default="1GB", help="of the emulated accelerator")
    parser.add_argument("--sequences", type=int, default=sequences)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=16)
    return parser


def machine(settings: argparse.Namespace) -> Hardware:
    """An accelerator that the CPU emulates computes at its rates; only the link is another one."""
    here = settle_hardware(None, settings.cache_dir, settings.cache_dir, say)
    return dataclasses.replace(here, gpu=None, h2d=Transfer(settings.link), d2h=None)


def drawn_prompts(settings: argparse.Namespace) -> list[list[int]]:
    draw = random.Random(0)
    lengths = [settings.prompt_tokens] * settings.sequences
    return [[draw.randrange(FIRST_PROMPT_TOKEN, 30_000) for _ in range(length)] for length in lengths]


def show(results: dict[str, dict]) -> None:
    for name, result in results.items():
        print(
            f"{name:<10} {result['tokens_per_second']:7.1f} tokens/s, {result['seconds']:6.1f} s, {result['passes']} "
            f"passes, {result['link_bytes'] / 1e9:.1f} GB over the link, busy {result['link_busy_seconds']:.1f} s, "
            f"forecast {result['forecast_seconds']:.1f} s ({result['forecast_error']:+.0%})"
        )


def main() -> int:
    parser = arguments(__doc__, 64)
    parser.add_argument("--shared", type=int, default=16, help="sequences of a micro-batch")
    settings = parser.parse_args()
    hardware, prompts = machine(settings), drawn_prompts(settings)
    results = {name: run(policy, prompts, settings, hardware) for name, policy in policies(settings).items()}
    first, second = (result.pop("token_ids") for result in results.values())
    show(results)
    ratio = results["one size"]["seconds"] / results["by module"]["seconds"]
    same = sum(pair[0] == pair[1] for pair in zip(first, second))
    print(f"by module is {ratio:.2f} times as fast; {same} of {len(first)} answers are the same")
    print(json.dumps({"runs": results, "ratio": ratio, "same_answers": same, "link_bytes_per_second": settings.link}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
