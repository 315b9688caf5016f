"""A model larger than its memory: flexrun in a control group smaller than the weights, with its own budget inside it.

    python benchmarks/memory_budget.py --model DIR --check-tokens

Runs in a group of 1.5 GB with --cpu-memory 1GiB. Without --disk-dir the packed weights are written inside the group
too, to a temporary folder. Checks that the process survives and that its measured peak stays within the budget.
The last line of stdout is one JSON document; the exit code is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from control_group import ControlGroupError
from cpu_vs_peers import DEFAULT_CACHE, size_in_bytes, write_prompts
from processes import RunFailed, drop_page_cache, end_on_terminate, flags, run_json, say, worker_command

COMPARED_PROMPTS = 4


def measure(settings: argparse.Namespace, scratch: Path) -> dict:
    """The run in the group, and with --check-tokens the run in RAM that it is compared with."""
    from flexrun.llm import open_model

    files = open_model(settings.model, dtype="bfloat16")
    weight_bytes, vocab_size = files.spec.weight_bytes, files.spec.vocab_size
    files.close()
    prompts = scratch / "prompts.json"
    write_prompts(prompts, settings, vocab_size)
    disk_dir = settings.disk_dir or scratch / "packed"
    packs = not list(disk_dir.glob("*/manifest.json"))
    drop_page_cache([settings.model])
    say(f"flexrun in {settings.memory_limit / 1e9:.2f} GB" + (", packing the weights there first" if packs else ""))
    run = run_flexrun(settings, prompts, disk_dir, settings.cpu_memory, settings.memory_limit)
    tier = run["summary"]["tiers"]["cpu"]
    result = {
        "model": str(settings.model),
        "weight_bytes": weight_bytes,
        "cpu_memory_bytes": tier["budget_bytes"],
        "tier_peak_bytes": tier["peak_bytes"],
        "process_peak_bytes": run["peak_rss_bytes"],
        "control_group": run["control_group"],
        "packed_inside": packs,
        "checks": {
            "survived": run["control_group"]["oom_kills"] == 0,
            "peak_within_budget": tier["peak_bytes"] <= tier["budget_bytes"],
        },
    }
    if settings.check_tokens:
        say("the first prompts again, all in RAM")
        first = scratch / "first.json"
        first.write_text(json.dumps(json.loads(prompts.read_text())[:COMPARED_PROMPTS]))
        pairs = list(zip(run["token_ids"], run_flexrun(settings, first, disk_dir, None, None)["token_ids"]))
        result["tokens_compared"] = sum(len(limited) for limited, _ in pairs)
        result["tokens_equal_before_first_difference"] = sum(_common_prefix(*pair) for pair in pairs)
        result["prompts_compared"] = len(pairs)
        result["prompts_equal"] = sum(limited == in_ram for limited, in_ram in pairs)
    return result | {"run": run}


def run_flexrun(
    settings: argparse.Namespace, prompts: Path, disk_dir: Path, cpu_memory: str | None, limit_bytes: int | None
) -> dict:
    given = {
        "model": settings.model,
        "prompts": prompts,
        "output_tokens": settings.output_tokens,
        "disk_dir": disk_dir,
        "cpu_memory": cpu_memory,
        "report_tokens": COMPARED_PROMPTS,
    }
    return run_json(worker_command(sys.executable, "workers.py", "flexrun", *flags(given)), limit_bytes=limit_bytes)


def _common_prefix(left: list[int], right: list[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def print_result(result: dict) -> None:
    group, run = result["control_group"], result["run"]
    group_peak = group["max_usage_bytes"]
    for name, text in (
        (
            "weights",
            f"{result['weight_bytes'] / 1e9:.3f} GB, packed {'inside' if result['packed_inside'] else 'before'}",
        ),
        (
            "tier peak",
            f"{result['tier_peak_bytes'] / 1e9:.3f} GB of a budget of {result['cpu_memory_bytes'] / 1e9:.3f}",
        ),
        ("process peak", f"{result['process_peak_bytes'] / 1e9:.3f} GB (VmHWM, with interpreter and libraries)"),
        (
            "group peak",
            f"{'unknown' if group_peak is None else f'{group_peak / 1e9:.3f} GB'} of {group['limit_bytes'] / 1e9:.3f} "
            f"(with page cache), {group['oom_kills']} killed for memory",
        ),
        ("speed", f"{run['tokens_per_second']:.1f} tokens/s, load {run['load_seconds']:.1f} s"),
    ):
        print(f"  {name:<13} {text}")
    if "prompts_equal" in result:
        print(
            f"  {'tokens':<13} {result['prompts_equal']} of {result['prompts_compared']} prompts as in RAM; "
            f"{result['tokens_equal_before_first_difference']} of {result['tokens_compared']} tokens before the first "
            "difference (bfloat16 may part at a tie)"
        )
    for check, passed in result["checks"].items():
        print(f"  {check:<19} {'yes' if passed else 'NO'}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_CACHE / "llama-1b", metavar="DIR")
    parser.add_argument("--memory-limit", type=size_in_bytes, default=1_500_000_000, help="of the group (1.5GB)")
    parser.add_argument("--cpu-memory", default="1GiB", help="flexrun's budget within it")
    parser.add_argument("--disk-dir", type=Path, help="packed weights (default: a temporary folder)")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-tokens", action="store_true", help="compare with a run in RAM")
    parser.add_argument("--output", type=Path, help="write the JSON document here as well")
    return parser


def main() -> int:
    settings = build_parser().parse_args()
    end_on_terminate()
    if not (settings.model / "config.json").exists():
        say(f"error: {settings.model} holds no model; write one with make_checkpoint.py llama-1b {settings.model}")
        return 2
    # Beside the model: /tmp may be RAM, and weights kept there would count against the group.
    with tempfile.TemporaryDirectory(dir=settings.model.parent, prefix="memory-budget-") as scratch:
        try:
            result = measure(settings, Path(scratch))
        except RunFailed as error:
            result = {"model": str(settings.model), "checks": {"survived": False}, "message": str(error)}
            print(f"  the process did not survive: {error}")
        except ControlGroupError as error:
            say(f"error: {error}")
            return 2
        else:
            print_result(result)
    print(json.dumps(result))
    if settings.output:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
