"""Measure throughput on workloads of given lengths, each beside its forecast."""

from __future__ import annotations

import argparse
import sys

from flexrun.cli.machine import (
    add_machine_flags,
    add_model_flags,
    add_weight_flags,
    llm_arguments,
    weight_arguments,
)
from flexrun.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    workload = parser.add_argument_group("workload: one for each pair of lengths, or a suite")
    workload.add_argument("--prompt-len", type=_lengths, default=[512], metavar="TOKENS[,TOKENS...]")
    workload.add_argument("--gen-len", type=_lengths, default=[32], metavar="TOKENS[,TOKENS...]")
    workload.add_argument("--num-prompts", type=int, default=64, metavar="COUNT", help="default: 64")
    workload.add_argument("--suite", choices=("helm",), help="the shapes of seven sub-scenarios of HELM instead")
    workload.add_argument("--share", type=float, default=1.0, metavar="X", help="of the prompts of a suite, in (0, 1]")
    workload.add_argument("--seed", type=int, default=0, help="of the random prompts")

    parser.add_argument("--repetitions", type=int, default=3, metavar="COUNT", help="measured; default: 3")
    parser.add_argument("--warmup", type=int, default=1, metavar="COUNT", help="runs before, unmeasured; default: 1")
    parser.add_argument("-o", "--output", default="md", choices=("md", "csv", "json"), help="what stdout gets")
    machine = add_machine_flags(parser)
    machine.add_argument("--policy", default="auto", metavar="auto|FILE", help="policy JSON; see configs/policies")
    add_weight_flags(machine)


def call(args: argparse.Namespace) -> int:
    from flexrun.evals.throughput import helm_suite, measure, render, sweep
    from flexrun.llm import LLM

    for name, least in (("repetitions", 1), ("warmup", 0), ("num_prompts", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} is too few", f"at least {least}")
    if not 0 < args.share <= 1:
        raise ConfigError(f"--share {args.share} is outside (0, 1]", "1 runs every prompt of the suite")
    cells = helm_suite(args.share) if args.suite else sweep(args.num_prompts, args.prompt_len, args.gen_len)
    policy = None if args.policy == "auto" else args.policy
    with LLM(args.model, policy=policy, log=_say, **llm_arguments(args), **weight_arguments(args)) as llm:
        results = []
        for result in measure(llm, cells, repetitions=args.repetitions, warmup=args.warmup, seed=args.seed):
            results.append(result)
            _say(f"{result.cell.name}: {result.seconds:.2f} s, {result.generated_per_second:.1f} tokens/s generated")
    if len(results) > 1:
        prompts = sum(result.cell.prompts for result in results)
        _say(f"all {len(results)} workloads: {prompts:,} prompts in {sum(result.seconds for result in results):,.2f} s")
    print(render(results, args.output))
    return 0


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, as in 256,512") from None
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError("lengths are at least 1")
    return lengths


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
