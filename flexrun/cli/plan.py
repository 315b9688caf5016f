"""Find the fastest policy for a job, and say what it will take; needs a model's config.json only."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from flexrun.cli.machine import (
    MODEL_FLAGS,
    add_model_flags,
    add_weight_flags,
    bits_in_force,
    prefix_unit,
    weight_arguments,
)
from flexrun.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)

    job = parser.add_argument_group("job")
    job.add_argument("-i", "--input-file", metavar="FILE", help="prompts, JSONL; or describe them:")
    job.add_argument("--prompt-len", type=int, default=512, metavar="TOKENS")
    job.add_argument("--gen-len", "--max-tokens", type=int, default=128, metavar="TOKENS", help="generated a prompt")
    job.add_argument("--num-prompts", type=int, default=1000, metavar="COUNT")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--hardware", metavar="FILE", help="as in configs/hardware; default: this machine")
    machine.add_argument("--gpu-memory", metavar="SIZE", help="default: most of what there is; 0: no GPU")
    machine.add_argument("--cpu-memory", metavar="SIZE")
    machine.add_argument("--disk-memory", metavar="SIZE", help="for weights and KV cache; default: what is free")

    policy = parser.add_argument_group("policy")
    policy.add_argument("--max-num-seqs", type=int, metavar="COUNT", help="sequences in flight")
    policy.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="keep a field of the policy",
    )
    add_weight_flags(policy)
    policy.add_argument("--policy", metavar="FILE", help="do not search: forecast this policy")
    policy.add_argument(
        "--all-features",
        action="store_true",
        help="also plan passes larger than the GPU, whose hidden states wait in RAM (seldom faster, a longer search)",
    )

    policy.add_argument(
        "--effort", type=float, default=1.0, metavar="X", help="search X times as long; worth it for a job of hours"
    )

    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output-file", metavar="FILE", help="the policy, for flexrun run --policy FILE")
    output.add_argument("--json", action="store_true", help="everything as JSON on stdout")
    output.add_argument("--plot", metavar="FILE", help="picture of some passes, as SVG")


def call(args: argparse.Namespace) -> int:
    from flexrun.config import Policy
    from flexrun.llm.given_policy import check_activations
    from flexrun.llm.machine_profile import settle_hardware
    from flexrun.llm.model_files import read_model_plan
    from flexrun.llm.planning import as_budgets, plan_of, search_plan
    from flexrun.placement import weight_bits_of
    from flexrun.policy.explain import format_plan, plan_document
    from flexrun.policy.features import AUTO_CHOICES, PLANNABLE, RUNNABLE

    model = read_model_plan(args.model, **{name: getattr(args, name) for name in MODEL_FLAGS})
    workload = _workload(args, model)
    hardware = settle_hardware(args.hardware, args.cache_dir, say=lambda text: print(text, file=sys.stderr))
    budgets = as_budgets({"gpu": args.gpu_memory, "cpu": args.cpu_memory, "disk": args.disk_memory}, hardware)
    if args.policy is not None:
        if left := [f"--{name.replace('_', '-')}" for name in AUTO_CHOICES if getattr(args, name) == "auto"]:
            raise ConfigError(f"{left[0]} auto needs a search, and --policy says there is none", "name the bits")
        policy = dataclasses.replace(Policy.from_json(args.policy), **_fixed(args))
        plan = plan_of(policy, model.spec, hardware, workload, budgets)
    else:
        features = PLANNABLE if args.all_features else RUNNABLE
        left = {name: choices for name, choices in AUTO_CHOICES.items() if getattr(args, name) == "auto"}
        features = dataclasses.replace(features, **left)
        if not 0 < args.effort <= 1000:
            raise ConfigError(f"--effort {args.effort:g} is outside (0, 1000]", "1 takes seconds")
        plan = search_plan(
            model.spec, hardware, workload, budgets, fixed=_fixed(args), features=features, effort=args.effort
        )
    weight_bits_of(plan.policy).check(model.spec.tensors_by_layer())
    if args.weight_bits != "auto":
        check_activations(plan.policy)
    if args.json:
        document = {"model_name": model.name, "hardware": hardware.name, **plan_document(plan)}
        print(json.dumps(document, indent=2))
    else:
        prompt_tokens, max_tokens = int(workload.prompt_tokens.sum()), int(workload.max_tokens.sum())
        print(f"{model.name} on {hardware.name}")
        print(f"{len(workload):,} sequences: {prompt_tokens:,} prompt tokens, at most {max_tokens:,} to generate\n")
        print(format_plan(plan))
    if args.output_file is not None:
        _write(args.output_file, plan.policy.to_json() + "\n")
    if args.plot is not None:
        from flexrun.llm.planning import simulate
        from flexrun.report.plot import timeline_svg

        timeline = simulate(plan.policy, model.spec, hardware, workload, budgets, passes=3, skip=1)
        _write(args.plot, timeline_svg(timeline.events))
    return 0


def _workload(args: argparse.Namespace, model):
    from flexrun.jobs.workload import Workload
    from flexrun.sampling import SamplingParams

    if args.input_file is not None:
        sampling = SamplingParams(temperature=0.0, max_tokens=args.gen_len)
        unit = prefix_unit(bits_in_force(args)["kv_bits"])
        workload = Workload.from_jsonl(args.input_file, model, sampling=sampling, prefix_unit=unit)
        if not len(workload):
            raise ConfigError(f"{args.input_file} holds no prompt that can be planned", "check it with flexrun run")
        return workload
    for name in ("prompt_len", "gen_len", "num_prompts"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.prompt_len + args.gen_len > model.max_model_len:
        raise ConfigError(
            f"--prompt-len {args.prompt_len} and --gen-len {args.gen_len} are more than the {model.max_model_len} "
            "tokens of the model together",
            "lower one of them",
        )
    return Workload.uniform(args.num_prompts, args.prompt_len, args.gen_len)


def _fixed(args: argparse.Namespace) -> dict:
    """Policy fields that the command line decides."""
    from flexrun.config import Policy
    from flexrun.core import strict_dataclass

    values = {}
    for text in args.fix:
        name, _, value = text.partition("=")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError as error:
            hint = 'write for example tokens_per_pass=4096 or weights={"gpu":0,"cpu":1,"disk":0}'
            raise ConfigError(f"cannot read --fix {text!r}", hint) from error
    values |= {name: value for name, value in weight_arguments(args).items() if value not in (None, "auto")}
    if args.max_num_seqs is not None:
        values["sequences_in_flight"] = args.max_num_seqs
    checked = dataclasses.replace(strict_dataclass(Policy, values, "--fix"))
    return {name: getattr(checked, name) for name in values}


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "name a file that can be") from error
