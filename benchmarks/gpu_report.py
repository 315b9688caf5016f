"""Words and tables of what gpu.py found."""

from __future__ import annotations

import datetime

TARGETS = "at least 85 % of the bound, 1.5 times FlexGen, 5 times accelerate"


def today() -> str:
    return datetime.date.today().isoformat()


def checks_line(checks: dict) -> str:
    comparisons = checks["comparisons"]
    failed = [each["name"] for each in comparisons if not each["passed"]]
    words = f"numerics: {len(comparisons) - len(failed)} of {len(comparisons)} comparisons with float64 agree; "
    words += f"tokens: {checks['policies'] - len(checks['differing'])} of {checks['policies']} policies give those of "
    return words + "the CPU" + (f"; failed: {', '.join(failed)}" if failed else "")


def case_line(row: dict) -> str:
    if "skipped" in row or "failed" in row:
        return f"{row['case']}: {_outcome(row)}"
    words = (
        f"{row['case']}: {row['tokens_per_second']:.1f} tokens/s in {row['seconds']:.1f} s (forecast "
        f"{row['forecast_seconds']:.1f} s), {row['share_of_bound']:.0%} of the bound ({row['busiest_lane']})"
    )
    for peer in row["peers"]:
        words += f"\n  {peer['engine']}: {_peer(row, peer)}"
    return words


def _outcome(row: dict) -> str:
    return f"skipped, {row['skipped']}" if "skipped" in row else f"FAILED, {row['failed']}"


def _peer(row: dict, peer: dict) -> str:
    if "tokens_per_second" not in peer:
        return _outcome(peer)
    ratio = row["tokens_per_second"] / peer["tokens_per_second"]
    return (
        f"{peer['version']}, {peer['setting']}: {peer['tokens_per_second']:.1f} tokens/s ({peer['generated_tokens']} "
        f"tokens in {peer['seconds']:.1f} s); ours is {ratio:.2f} times as fast"
    )


def document(results: dict, hardware_text: str) -> str:
    """The results file, as Markdown."""
    lines = [
        f"# {today()}: {results['hardware']['name']}",
        "",
        f"`{results['command']}`, torch {results['torch']}, {results['minutes']:.1f} minutes. Targets: {TARGETS}.",
        "",
        "## Lanes",
        "",
        "```",
        hardware_text,
        "```",
        "",
        "## Numerics",
        "",
        checks_line(results["checks"]),
        "",
        *_worst(results["checks"]["comparisons"]),
        *(f"- {each['model']}: {each['difference']}, {each['policy']}" for each in results["checks"]["differing"]),
        "",
        "## Offloaded models",
        "",
        "Random weights, greedy, to the last token; loading and a short warm-up excluded. The bound is the busiest",
        "lane: its bytes at the bandwidth measured above, or its FLOPs as the profile has them.",
        "",
        "| case | sequences x prompt+output | budgets GPU / RAM, GB | tokens/s | seconds | forecast | busiest lane "
        "| share of bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    run = [row for row in results["cases"] if "seconds" in row]
    for row in run:
        work = row["work"]
        lines.append(
            f"| {row['case']} | {work['sequences']} x {work['prompt_tokens']}+{work['output_tokens']} "
            f"| {row['gpu_memory_bytes'] / 1e9:.3g} / {row['cpu_memory_bytes'] / 1e9:.3g} "
            f"| {row['tokens_per_second']:.1f} | {row['seconds']:.2f} | {row['forecast_seconds']:.2f} "
            f"| {row['busiest_lane']} | {row['share_of_bound']:.0%} |"
        )
    lines += ["", *(f"- {row['case']}: {_outcome(row)}" for row in results["cases"] if "seconds" not in row)]
    lines += [""] if len(run) < len(results["cases"]) else []
    lines += ["## Peers", "", "The same prompts, GPU and RAM budgets.", ""]
    lines += [f"- {row['case']}: {peer['engine']} {_peer(row, peer)}" for row in run for peer in row["peers"]]
    lines += ["", "## Policies of the planner", ""]
    lines += [f"- {row['case']}: `{_policy(row['policy'])}`" for row in run]
    return "\n".join(lines) + "\n"


def _worst(comparisons: list[dict]) -> list[str]:
    """The largest error of each dtype, as a share of the largest value."""
    worst: dict[str, dict] = {}
    for each in comparisons:
        dtype = next(name for name in ("bfloat16", "float16", "float32") if name in each["name"])
        worst[dtype] = max(worst.get(dtype, each), each, key=lambda check: check["error"])
    return [f"- {dtype}: at most {check['error']:.2g} ({check['name']})" for dtype, check in worst.items()]


def _policy(policy: dict) -> str:
    """What differs from one policy to the next, in one line."""
    words = []
    for name, value in policy.items():
        if isinstance(value, dict):
            value = "/".join(f"{share:.3g}" for share in value.values())
        words.append(f"{name}={value}")
    return " ".join(words)
