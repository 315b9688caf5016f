"""Experts run by the CPU where they lie, beside experts copied to an emulated accelerator behind a slow link.

    python benchmarks/make_checkpoint.py mixtral-1b MODEL_DIR
    python benchmarks/cpu_experts.py --model MODEL_DIR --cache-dir DIR [--link 2GB] [--sequences 8] [--shares 0 0.5 1]

The same engine and policy, weights in RAM, few sequences, with each share of the experts on the CPU in turn, as often
as --rounds says; the median of each counts. Each forecast is made before its run. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

from expert_batching import arguments, drawn_prompts, machine, run, show

from flexrun import Policy
from flexrun.config import Placement


def policy(settings: argparse.Namespace, share: float) -> Policy:
    return Policy(
        sequences_in_flight=settings.sequences,
        tokens_per_pass=settings.sequences * settings.prompt_tokens,
        attention_micro_batch=settings.sequences,
        token_micro_batch=512,
        expert_batch=256,
        weights=Placement(0, 1, 0),
        kv=Placement(1, 0, 0),
        cpu_experts_share=share,
    )


def main() -> int:
    parser = arguments(__doc__, 8)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    hardware, prompts = machine(settings), drawn_prompts(settings)
    runs: dict[float, list[dict]] = {share: [] for share in settings.shares}
    for _ in range(settings.rounds):
        for share, found in runs.items():
            found.append(run(policy(settings, share), prompts, settings, hardware))
    answers = [tokens for found in runs.values() for tokens in found[0]["token_ids"]]
    first = answers[: settings.sequences]
    same = [
        sum(tokens == expected for tokens, expected in zip(found[0]["token_ids"], first)) for found in runs.values()
    ]
    medians = {}
    for share, found in runs.items():
        seconds = statistics.median_low(result["seconds"] for result in found)
        medians[f"share {share:g}"] = next(result for result in found if result["seconds"] == seconds)
    for result in medians.values():
        result.pop("token_ids")
    show(medians)
    base, *others = (result["seconds"] for result in medians.values())
    print(f"against the first {', '.join(f'{base / seconds:.2f}' for seconds in others)} times as fast")
    print(f"answers that are the first's: {same} of {settings.sequences}")
    print(json.dumps({"runs": medians, "same_answers": same, "link_bytes_per_second": settings.link}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
