"""Answer every prompt of a JSONL file, with resume."""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
from pathlib import Path

from flexrun.cli.machine import (
    MACHINE_FLAGS,
    MODEL_FLAGS,
    add_machine_flags,
    add_model_flags,
    add_weight_flags,
    bits_in_force,
    prefix_unit,
    weight_arguments,
)
from flexrun.errors import ConfigError, ExecutionError

SAMPLING_FLAGS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "logprobs",
    "ignore_eos",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
RUN_FLAGS = ("cache_dir", "policy", "seed", "trace", "save_expert_profile")


def add_flags(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument(
        "-i", "--input-file", required=True, metavar="FILE", help="prompts, JSONL, .gz or .zst; - is stdin"
    )
    files.add_argument("-o", "--output-file", required=True, metavar="FILE", help="answers, JSONL; - is stdout")
    files.add_argument("--error-file", metavar="FILE", help="refused and failed lines go here, not to the output")
    files.add_argument("--output-json", metavar="FILE", help="summary of the job as one JSON object; - is stdout")
    files.add_argument("--report", metavar="DIR", help="a page about the run, and its timeline, go into this folder")
    files.add_argument("--trace", metavar="FILE", help="timeline of the run, in Chrome's trace format")

    files.add_argument("--save-expert-profile", metavar="FILE", help="tokens that each expert got, for later runs")

    model = add_model_flags(parser)
    model.add_argument("--chat-template", metavar="FILE", help="Jinja2 chat template in place of the model's own")

    sampling = parser.add_argument_group("sampling (a line's own values win)")
    sampling.add_argument("--max-tokens", "--max-new-tokens", type=int, default=128, metavar="TOKENS")
    sampling.add_argument("--min-tokens", type=int, default=0, metavar="TOKENS")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P")
    sampling.add_argument("--n", type=int, default=1, metavar="COUNT", help="choices generated a prompt")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer; may be given repeatedly")
    sampling.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID")
    sampling.add_argument("--seed", type=int, default=0, help="lines without a seed derive theirs from it")
    sampling.add_argument("--logprobs", type=int, metavar="COUNT", help="likeliest tokens reported a position")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on to max-tokens")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    sampling.add_argument("--presence-penalty", type=float, default=0.0, metavar="X")
    sampling.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X")
    sampling.add_argument("--return-token-ids", action="store_true", help="put token ids beside the text")

    machine = add_machine_flags(parser)
    machine.add_argument("--policy", default="auto", metavar="auto|FILE", help="policy JSON; see configs/policies")
    add_weight_flags(machine)

    job = parser.add_argument_group("job")
    job.add_argument("--limit", type=int, metavar="LINES", help="only the first lines of the input")
    job.add_argument("--order", default="longest", choices=("longest", "input"), help="which lines run first")
    job.add_argument("--strict", action="store_true", help="stop before weights are loaded if any line is bad")
    job.add_argument(
        "--shared-prefixes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run once what prompts begin with in common, where that pays; default: do",
    )
    job.add_argument("--resume", action="store_true", help="go on where an earlier run of the same job ended")
    job.add_argument("--retry-errors", action="store_true", help="with --resume: do failed lines again")
    job.add_argument("--overwrite", action="store_true", help="replace an output file that exists")
    job.add_argument("--preserve-order", action="store_true", help="put the output into input order at the end")
    job.add_argument("--progress", action=argparse.BooleanOptionalAction, help="default: a bar on a terminal")


def call(args: argparse.Namespace) -> int:
    from flexrun.jobs.files import check_distinct
    from flexrun.jobs.report import TRACE_FILE
    from flexrun.jobs.runner import JobConfig, run_job
    from flexrun.jobs.summary import format_summary
    from flexrun.llm import LLM, open_model
    from flexrun.report.side_files import check_side_file
    from flexrun.sampling import SamplingParams

    gc.freeze()  # what libraries brought stays: a collection that went through it would stop every lane for 0.2 s
    if args.output_file == "-" and args.output_json == "-":
        raise ConfigError("-o - and --output-json - both want stdout", "send one of them to a file")
    check_distinct(
        {
            "the input file": args.input_file,
            "the output file": args.output_file,
            "the error file": args.error_file,
            "the summary file": args.output_json,
            "the trace file": args.trace,
            "the expert profile": args.save_expert_profile,
        }
    )
    for path in (args.output_json, args.trace, args.save_expert_profile):
        check_side_file(None if path == "-" else path)
    template = None if args.chat_template is None else _read(args.chat_template)
    given = {name: getattr(args, name) for name in SAMPLING_FLAGS}
    bits = bits_in_force(args)
    config = JobConfig(
        input_file=args.input_file,
        output_file=args.output_file,
        model_name=args.model,
        sampling=SamplingParams(**given, stop=args.stop or (), stop_token_ids=args.stop_token_ids or ()),
        error_file=args.error_file,
        order=args.order,
        limit=args.limit,
        strict=args.strict,
        resume=args.resume,
        retry_errors=args.retry_errors,
        overwrite=args.overwrite,
        preserve_order=args.preserve_order,
        return_token_ids=args.return_token_ids,
        progress=args.progress,
        report_dir=args.report,
        shared_prefixes=args.shared_prefixes,
        prefix_unit=prefix_unit(bits["kv_bits"]),
        identity={
            "dtype": args.dtype,
            "tokenizer": args.tokenizer,
            "chat_template": template,
            "seed": args.seed,
            **(
                {"weight_bits": [bits[name] for name in ("weight_bits", "keep", "weight_group")]}
                if bits["weight_bits"] or bits["keep"]
                else {}
            ),
            **{name: bits[name] for name in ("activation_bits", "kv_bits") if bits[name]},
        },
    )
    model = {name: getattr(args, name) for name in MODEL_FLAGS}
    engine = {name: getattr(args, name) for name in (*MACHINE_FLAGS, *RUN_FLAGS)}
    if args.report is not None and args.trace is None:
        engine["trace"] = Path(args.report, TRACE_FILE)
    progress = sys.stderr.isatty() if args.progress is None else args.progress
    summary = run_job(
        config,
        lambda: open_model(args.model, chat_template=template, **model),
        lambda files, **chosen: LLM(
            files, progress=progress, log=_log, **engine, **{**weight_arguments(args), **chosen}
        ),
    )
    print(f"\n{format_summary(summary)}", file=sys.stderr)
    if args.output_json is not None:
        _write(args.output_json, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    if summary["interrupted"]:
        print(f"\ninterrupted; {_how_to_go_on(args)}", file=sys.stderr)
        return 130
    return 1 if summary["requests"]["failed"] + summary["requests"]["failed_before"] else 0


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _how_to_go_on(args: argparse.Namespace) -> str:
    if args.output_file == "-":
        return "a job that writes to stdout cannot be resumed; write to a file with -o FILE"
    words = [word for word in args.command_line if word not in ("--overwrite", "--resume")]
    return f"go on with:\n  flexrun {shlex.join([*words, '--resume'])}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template {path} cannot be read: {error}", "give a file of Jinja2 source") from error


def _write(path: str, text: str) -> None:
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ExecutionError(f"summary {path} cannot be written: {error.strerror}", "the answers are safe") from error
