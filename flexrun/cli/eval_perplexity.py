"""How well a model predicts a text, under one setting or several side by side."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from flexrun.cli.machine import MODEL_FLAGS, add_machine_flags, add_model_flags, llm_arguments
from flexrun.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="plain text, UTF-8")
    parser.add_argument("--context", type=int, default=1024, metavar="TOKENS", help="the text is cut to such pieces")
    parser.add_argument("--limit", type=int, metavar="TOKENS", help="only the first tokens of the text")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="WORDS",
        help='"weight-bits=4 keep=*.down_proj=8" or "policy=FILE"; may be given repeatedly: a row each',
    )
    parser.add_argument("--json", action="store_true", help="the results as JSON on stdout")

    add_machine_flags(parser)


def call(args: argparse.Namespace) -> int:
    from flexrun.evals.perplexity import Setting, compare, format_table
    from flexrun.llm import LLM, open_model

    settings = [Setting.parse(text) for text in args.setting or [""]]
    files = open_model(args.model, **{name: getattr(args, name) for name in MODEL_FLAGS})
    try:
        token_ids = text_tokens(files.tokenizer, args.text)[: args.limit]
    finally:
        files.close()
    results = []
    for result in compare(partial(LLM, args.model, **llm_arguments(args)), settings, token_ids, args.context):
        results.append(result)
        print(f"{result.setting or 'as stored'}: {result.perplexity:.4f}", file=sys.stderr, flush=True)
    print(json.dumps([each.document() for each in results], indent=2) if args.json else format_table(results))
    return 0


def text_tokens(tokenizer, path: str) -> list[int]:
    """The token ids of a file's text."""
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer", "name one with --tokenizer")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text {path} cannot be read: {error}", "give a file of plain UTF-8 text") from error
    return tokenizer.encode(text)
