"""The command line: parses, calls, prints. Everything heavy is imported by the command that needs it.

Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 some requests failed, 2 wrong usage or
settings, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from flexrun import __version__
from flexrun.cli import bench, bench_helm, eval_perplexity, plan, profile, quantize, run
from flexrun.cli.parser import Parser
from flexrun.cli.stopping import INTERRUPTED, signals_end_at_once, signals_interrupt
from flexrun.cli.style import print_error
from flexrun.errors import ExecutionError, FlexrunError
from flexrun.openmp import import_torch

# A command is a module with add_flags(parser) and call(args) -> exit code.
COMMANDS = {
    "run": run,
    "plan": plan,
    "profile": profile,
    "bench": bench,
    "bench helm": bench_helm,
    "quantize": quantize,
    "eval-perplexity": eval_perplexity,
}

SOME_FAILED, USAGE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args = build_parser().parse_args(_with_two_words(command_line))
    except SystemExit as ending:  # argparse leaves this way after --help, --version and errors
        return int(ending.code or 0)
    args.command_line = command_line
    with signals_end_at_once():
        import_torch()
    try:
        with signals_interrupt():
            return args.call(args)
    except FlexrunError as error:
        print_error(error.message, error.hint)
        return SOME_FAILED if isinstance(error, ExecutionError) else USAGE
    except KeyboardInterrupt:
        resume = "nothing that was written is lost; go on with --resume"
        print_error("interrupted", resume if args.call is run.call else "run it again")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout went away, as in "flexrun ... | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SOME_FAILED


def _with_two_words(words: list[str]) -> list[str]:
    """A command of two words, as argparse wants it: in one."""
    return [" ".join(words[:2]), *words[2:]] if " ".join(words[:2]) in COMMANDS and len(words) > 1 else words


def build_parser() -> Parser:
    parser = Parser(prog="flexrun", description="Single-GPU offloading throughput runner for large language models.")
    parser.add_argument("--version", action="version", version=f"flexrun {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_flags(command)
        command.set_defaults(call=module.call)
    return parser
