"""How near is the cost model to what FlexGen and MoE-Gen published, from data sheets and their engines' traits?

    python benchmarks/published.py [--calibrate] [--search] [--output FILE]

Prints each setting with its published figure, the forecast, the error and the lane that binds. ``--calibrate`` finds
the two rates of each engine again, from the rows named, and uses them. ``--search`` plans the same jobs on the same
machines for our own engine and compares them with the published policies. Needs no GPU, no model and a few seconds;
the search takes half a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from functools import cache
from pathlib import Path

from flexrun.hardware import Hardware
from flexrun.models.families import spec_from_config
from flexrun.models.spec import ModelSpec
from flexrun.policy.features import PLANNABLE
from flexrun.policy.forecast import Forecast, forecast
from flexrun.policy.layout import Budgets, Layout
from flexrun.policy.peers import published
from flexrun.policy.peers.forecast import filled, peer_forecast, policy_of
from flexrun.policy.peers.published import Published
from flexrun.policy.peers.traits import FLEXGEN, MOE_GEN, EngineTraits
from flexrun.policy.search import search
from flexrun.workload import Workload

BLOCKS = 4  # of the published size, in a job that is planned
CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = {
    "published tables (errors count)": published.TABLE,
    "calibrated on": published.MOE_GEN_CALIBRATION,
    "held out": published.HELD_OUT,
}


@cache
def spec_of(model: str) -> ModelSpec:
    return spec_from_config(json.loads((CONFIGS / "models" / f"{model}.json").read_text()), "auto")


@cache
def machine(name: str) -> Hardware:
    return Hardware.load(CONFIGS / "hardware" / f"{name}.json")


def calibrated() -> dict[str, EngineTraits]:
    return {
        FLEXGEN.name: published.calibrated_flexgen(spec_of("opt-175b"), machine(published.T4)),
        MOE_GEN.name: published.calibrated_moe_gen(spec_of("mixtral-8x7b"), machine(published.A5000)),
    }


def forecast_row(row: Published) -> dict[str, object]:
    forecast = peer_forecast(row.engine, spec_of(row.model), machine(row.machine), row.run)
    value = row.measure(forecast)
    return {
        "engine": row.engine.name,
        "model": row.model,
        "setting": row.setting,
        "published": row.figure,
        "forecast": value,
        "error": value / row.figure - 1.0,
        "binding_lane": row.phase(forecast).binding_lane.value,
        "note": row.note,
    }


def print_group(title: str, rows: list[dict[str, object]]) -> None:
    print(f"\n{title}, tokens/s")
    for row in rows:
        figures = f"{row['published']:8.2f} {row['forecast']:9.2f} {row['error']:+7.1%}  {row['binding_lane']:10}"
        print(f"  {row['engine']:8} {row['model']:14} {row['setting']:26} {figures} {row['note']}".rstrip())
    sizes = [abs(row["error"]) for row in rows]
    print(f"  median error {statistics.median(sizes):.1%}, largest {max(sizes):.1%}")


def print_breakdown(flexgen: EngineTraits) -> dict[str, dict[str, float]]:
    """OPT-175B without overlap, part by part."""
    block = peer_forecast(flexgen, spec_of("opt-175b"), machine(published.T4), published.BREAKDOWN_RUN)
    forecast = {}
    print("\nFlexGen opt-175b without overlap, seconds: compute is calibrated, parts were timed on their own")
    for name, parts in published.BREAKDOWN.items():
        phase = getattr(block, name)
        forecast[name] = {"total": phase.seconds, **{part: phase.part_seconds[part] for part in parts}}
        for part, seconds in {"total": published.BREAKDOWN_TOTALS[name], **parts}.items():
            value = forecast[name][part]
            print(f"  {name:8} {part:12} {seconds:8.0f} {value:9.0f} {value / seconds - 1:+7.1%}")
    return forecast


def print_helm() -> dict[str, float]:
    print("\nFlexGen on HELM, OPT-IML-30B, minutes: published ones include the start of the program")
    minutes = {row.scenario: row.forecast_minutes(spec_of("opt-30b"), machine(published.T4)) for row in published.HELM}
    for row in published.HELM:
        value = minutes[row.scenario]
        print(f"  {row.scenario:34} {row.minutes:6.0f} {value:7.0f} {value / row.minutes - 1:+7.1%}")
    return minutes


def print_search() -> list[dict[str, object]]:
    """Published policies and searched ones, both on our engine: tokens/s, and how busy each one's busiest lane is."""
    print("\nOur engine with the published policy, and with the searched one, generated tokens/s and the binding lane")
    results = []
    for row in published.POLICIES:
        spec, hardware = spec_of(row.model), machine(row.machine)
        run = filled(row.run, spec, hardware)
        workload = Workload.uniform(BLOCKS * run.sequences, run.prompt_tokens, run.generated_tokens)
        budgets = Budgets(hardware.cpu_memory_bytes, hardware.gpu_memory_bytes, hardware.disk_bytes)
        layout = Layout.of(spec, policy_of(run), workload, budgets)
        papers = forecast(layout, workload, hardware)
        plan = search(spec, hardware, workload, budgets, features=PLANNABLE)
        gain = papers.seconds / plan.forecast.seconds - 1.0
        fits = "" if layout.fits else " (the published policy leaves no room for our buffers)"
        print(f"  {row.model:14} {_speed(papers)}  ->  {_speed(plan.forecast)}  {gain:+.0%}{fits}")
        results.append(
            {
                "model": row.model,
                "papers": papers.generated_tokens_per_second,
                "papers_lane": papers.binding_lane.value,
                "searched": plan.forecast.generated_tokens_per_second,
                "searched_lane": plan.forecast.binding_lane.value,
                "policy": dataclasses.asdict(plan.policy),
            }
        )
    return results


def _speed(job: Forecast) -> str:
    lane = job.binding_lane
    return f"{job.generated_tokens_per_second:8.2f} {lane.value:9} {job.utilisation(lane):4.0%} busy"


def share_on_cpu(row: Published) -> float:
    """The CPU's share of attention at which the forecast falls to the published figure."""
    low, high = 0.03, 1.0
    for _ in range(40):
        share = (low + high) / 2
        run = dataclasses.replace(row.run, cpu_attention=share)
        slower = dataclasses.replace(row, run=run).forecast(spec_of(row.model), machine(row.machine)) < row.figure
        low, high = (low, share) if slower else (share, high)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true", help="find the two rates of each engine again")
    parser.add_argument("--search", action="store_true", help="also plan the same jobs for our own engine")
    parser.add_argument("--output", type=Path, help="also write the line of JSON here")
    arguments = parser.parse_args()
    engines = calibrated() if arguments.calibrate else {each.name: each for each in (FLEXGEN, MOE_GEN)}
    flexgen, moe_gen = engines[FLEXGEN.name], engines[MOE_GEN.name]
    print(f"FlexGen: matmul_share {flexgen.matmul_share:.4f}, cpu_bytes_per_second {flexgen.cpu_bytes_per_second:.4g}")
    print(f"MoE-Gen: matmul_share {moe_gen.matmul_share:.4f}, sync_seconds {moe_gen.sync_seconds:.4g}")
    result: dict[str, object] = {}
    for title, group in GROUPS.items():
        result[title] = [forecast_row(dataclasses.replace(row, engine=engines[row.engine.name])) for row in group]
        print_group(title, result[title])
    result["breakdown"] = print_breakdown(flexgen)
    result["helm_minutes"] = print_helm()
    row = dataclasses.replace(published.MOE_GEN_LATENT_ON_CPU, engine=moe_gen)
    print(
        f"\nMoE-Gen deepseek-v2 with some attention on the CPU, {row.figure:.0f} tokens/s: the share is not published, "
        f"the paper's search had chosen none. The forecast falls to it at a share of {share_on_cpu(row):.2f}."
    )
    if arguments.search:
        result["search"] = print_search()
    line = json.dumps(result)
    print(f"\n{line}")
    if arguments.output:
        arguments.output.write_text(line + "\n")


if __name__ == "__main__":
    main()
