"""Tune policies from Python for machines one may not own: how much GPU memory helps, and which machine is fastest.

    python examples/policy_tuning.py [--out throughput.svg]

Plans only: it needs a model's config.json, no weights, no GPU.
"""

import argparse
from pathlib import Path

from flexrun import Hardware, Workload, estimate, search_policy
from flexrun.errors import BudgetError
from flexrun.report.plot import curves_svg

CONFIGS = Path(__file__).parent.parent / "configs"
MODEL = CONFIGS / "models" / "opt-30b.json"
MACHINES = ("t4-gcp-208gb", "rtx-4090", "a100-80gb")
GPU_GIB = (4, 8, 12, 16, 20, 24)


def throughput(hardware: Hardware, workload: Workload, budgets: dict | None = None) -> float:
    """Generated tokens a second of the best policy; 0 where none fits."""
    try:
        policy = search_policy(MODEL, hardware, workload, budgets)
    except BudgetError as error:
        print(f"  {error.message}")
        return 0.0
    return estimate(policy, MODEL, hardware, workload, budgets).generated_tokens_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("throughput.svg"), help="the plot, as SVG")
    out = parser.parse_args().out
    workload = Workload.uniform(512, 512, 32)
    machines = {name: Hardware.load(CONFIGS / "hardware" / f"{name}.json") for name in MACHINES}

    print(f"{MODEL.stem}, {len(workload)} prompts of 512 tokens, 32 generated: best policy of each machine")
    for hardware in machines.values():
        print(f"  {hardware.name:<50} {throughput(hardware, workload):8.2f} tokens/s")

    hardware = machines["rtx-4090"]
    print(f"\n{hardware.name}: what GPU memory brings")
    curve = []
    for gib in GPU_GIB:
        curve.append((gib, throughput(hardware, workload, {"gpu": f"{gib}GiB"})))
        print(f"  {gib:>3} GiB {curve[-1][1]:8.2f} tokens/s")
    out.write_text(curves_svg({hardware.name: curve}, "GPU memory (GiB)", "generated tokens/s"))
    print(f"\nplot: {out}")


if __name__ == "__main__":
    main()
