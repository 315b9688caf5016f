"""Turns runs into ratios and shares of the machine's bounds, and says them to a person."""

from __future__ import annotations

import statistics

QUIET_SHARE = 0.10  # of the cores; more outside work than this marks a run as noisy
COLD_SHARE = 0.9  # of the weights must come from disk in each pass (an embedding may not), or the page cache has helped


def compare(name: str, peer: dict, pairs: list[tuple[dict, dict]]) -> dict:
    """Ratios pair by pair, so that a slow quarter of an hour hurts both sides alike; medians of all."""
    ratios = [own["tokens_per_second"] / other["tokens_per_second"] for own, other in pairs]
    runs = [other for _, other in pairs]
    result = {
        "version": runs[0]["version"],
        **peer,
        "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
        "flexrun_tokens_per_second": statistics.median(own["tokens_per_second"] for own, _ in pairs),
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "outside_cpu_shares": [[run["outside_cpu_share"] for run in pair] for pair in pairs],
        "runs": runs,
    }
    if name == "accelerate_disk":
        shares = [run["disk_bytes_read"] / (run["forward_passes"] * run["weight_bytes_per_pass"]) for run in runs]
        result |= {"share_of_weights_read_each_pass": shares, "cold": min(shares) >= COLD_SHARE}
    return result


def judge(run: dict, bounds: list[dict], disk: bool) -> dict:
    """How near ``run`` came to what the machine allows, by the better of the measurements before and after."""
    wall = run["seconds"]
    rates = {
        rows: max(bound["matmul_flops_per_second"][rows] for bound in bounds)
        for rows in bounds[0]["matmul_flops_per_second"]
    }
    prefill_flops, decode_flops = bounds[0]["prefill_flops"], bounds[0]["decode_flops"]
    peak = max(rates.values())
    compute_seconds = (prefill_flops + decode_flops) / peak
    result = {
        "wall_seconds": wall,
        "job_flops": prefill_flops + decode_flops,
        "matmul_flops_per_second": rates,
        "compute_ideal_seconds": compute_seconds,
        "compute_share_of_bound": compute_seconds / wall,
        # Decode multiplies few rows, where the machine itself is slower: the bound of this job's own shapes.
        "compute_ideal_seconds_by_rows": prefill_flops / rates["512"] + decode_flops / rates["64"],
    }
    result["compute_share_of_bound_by_rows"] = result["compute_ideal_seconds_by_rows"] / wall
    if disk:
        rate = max(bound["disk"]["bytes_per_second"] for bound in bounds)
        lane = run["summary"]["lanes"]["disk_read"]
        disk_seconds = lane["bytes"] / rate
        achieved = lane["bytes"] / lane["busy_seconds"] if lane["busy_seconds"] else 0.0
        result |= {
            "disk_bytes_per_second": rate,
            "disk_bytes": lane["bytes"],
            "disk_ideal_seconds": disk_seconds,
            "disk_share_of_rate_while_streaming": achieved / rate,
            "busiest_lane": "disk_read" if disk_seconds > compute_seconds else "cpu",
            "ideal_of_busiest_lane_over_wall": max(disk_seconds, compute_seconds) / wall,
        }
    return result


def print_case(result: dict) -> None:
    print(f"\n{result['case']}: {result['model']}")
    head = (
        "peer",
        "version",
        "settings",
        "tokens/s",
        "flexrun",
        "ratio",
        "ratios pair by pair",
        "peak RSS",
        "outside CPU",
    )
    rows = []
    for name, peer in result["peers"].items():
        busy = [share for pair in peer["outside_cpu_shares"] for share in pair]
        rows.append(
            (
                name,
                peer["version"],
                " ".join(f"{key}={value}" for key, value in peer["settings"].items()) or "-",
                f"{peer['tokens_per_second']:.1f}",
                f"{peer['flexrun_tokens_per_second']:.1f}",
                f"{peer['median_ratio']:.2f}",
                " ".join(f"{ratio:.2f}" for ratio in peer["ratios"]),
                f"{peer['peak_rss_bytes'] / 1e9:.2f} GB",
                f"{min(busy):.0%}-{max(busy):.0%}",
            )
        )
    print_table(head, rows)
    for name, reason in result["absent_peers"].items():
        print(f"  {name}: {reason}")
    if not result["peers"]:
        print(f"  flexrun alone: {result['flexrun_tokens_per_second']:.1f} tokens/s")
    for name, peer in result["peers"].items():
        noisy = sum(max(pair) > QUIET_SHARE for pair in peer["outside_cpu_shares"])
        if noisy:
            print(f"  note: in {noisy} pairs with {name}, others took over {QUIET_SHARE:.0%} of the cores")
        if not peer.get("cold", True):
            print(f"  note: the page cache held part of the weights of {name}: its figure is too good")
    bound = result["bounds"]
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s at {rows} rows" for rows, rate in bound["matmul_flops_per_second"].items()
    )
    print(f"  matmul bfloat16: {rates}")
    print(
        f"  flexrun: {bound['job_flops'] / 1e12:.2f} TFLOP in {bound['wall_seconds']:.1f} s; ideal at the peak "
        f"{bound['compute_ideal_seconds']:.1f} s ({bound['compute_share_of_bound']:.0%}), at the rates of its own row "
        f"counts {bound['compute_ideal_seconds_by_rows']:.1f} s ({bound['compute_share_of_bound_by_rows']:.0%})"
    )
    if "disk_ideal_seconds" in bound:
        rate, share = bound["disk_bytes_per_second"], bound["disk_share_of_rate_while_streaming"]
        print(
            f"  disk: {bound['disk_bytes'] / 1e9:.1f} GB read, direct rate {rate / 1e9:.2f} GB/s: ideal "
            f"{bound['disk_ideal_seconds']:.1f} s; while streaming {share:.0%} of the rate; busiest lane "
            f"{bound['busiest_lane']}, its ideal is {bound['ideal_of_busiest_lane_over_wall']:.0%} of the run"
        )


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
