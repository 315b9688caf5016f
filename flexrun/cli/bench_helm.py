"""Run scenarios of HELM and print time, throughput and HELM's metrics: flexrun bench helm ENTRY..."""

from __future__ import annotations

import argparse

from flexrun.cli.machine import (
    add_machine_flags,
    add_model_flags,
    add_weight_flags,
    llm_arguments,
    weight_arguments,
)
from flexrun.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("entries", nargs="+", metavar="ENTRY", help="as in synthetic_reasoning:mode=pattern_match")
    add_model_flags(parser)
    helm = parser.add_argument_group("HELM")
    helm.add_argument("--max-eval-instances", type=int, default=100, metavar="COUNT", help="of an entry; default: 100")
    helm.add_argument("--output-path", default="benchmark_output", metavar="DIR", help="where HELM keeps data and runs")
    helm.add_argument("--suite", default="flexrun", metavar="NAME", help="for helm-summarize; default: flexrun")
    helm.add_argument("--chat", action=argparse.BooleanOptionalAction, help="wrap prompts in the chat template")
    parser.add_argument("-o", "--output", default="md", choices=("md", "csv", "json"), help="what stdout gets")
    machine = add_machine_flags(parser)
    machine.add_argument("--policy", default="auto", metavar="auto|FILE", help="policy JSON; see configs/policies")
    add_weight_flags(machine)


def call(args: argparse.Namespace) -> int:
    if args.max_eval_instances < 1:
        raise ConfigError(f"--max-eval-instances {args.max_eval_instances} is too few", "at least 1")
    from flexrun.evals.helm_bench import bench_helm
    from flexrun.evals.helm_results import render

    options = {
        **llm_arguments(args),
        **weight_arguments(args),
        "policy": None if args.policy == "auto" else args.policy,
    }
    runs = bench_helm(
        args.model,
        args.entries,
        max_eval_instances=args.max_eval_instances,
        suite=args.suite,
        output_path=args.output_path,
        chat=args.chat,
        options={name: value for name, value in options.items() if value is not None},
    )
    print(render(runs, args.output))
    return 0
