"""Compress a model's weights ahead of a run, or find out which of its matrices need more bits than others."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flexrun.cli.eval_perplexity import text_tokens
from flexrun.errors import ConfigError

if TYPE_CHECKING:
    from flexrun.evals.sensitivity import Sensitivity
    from flexrun.models.spec import ModelSpec


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="directory, .gguf file or known model name")
    parser.add_argument("--weight-bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--keep", metavar="RULES", help="other bits for some, as in layers.0.*=16,*.down_proj=8")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--cache-dir", metavar="DIR", help="where fetched models and packed weights are kept")
    parser.add_argument("--disk-dir", metavar="DIR", help="where the compressed weights go; as of flexrun run")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="default: a bar on a terminal")

    auto = parser.add_argument_group("finding the bits of each matrix")
    auto.add_argument("--auto", action="store_true", help="print the rules for --keep that a text speaks for")
    auto.add_argument("--text", metavar="FILE", help="plain text, UTF-8")
    auto.add_argument("--limit", type=int, default=2048, metavar="TOKENS", help="only the first tokens of the text")
    auto.add_argument("--context", type=int, default=512, metavar="TOKENS", help="the text is cut to such pieces")
    target = auto.add_mutually_exclusive_group()
    target.add_argument(
        "--target-bits", type=float, metavar="BITS", help="average of an element; default: one more than --weight-bits"
    )
    target.add_argument(
        "--max-loss",
        type=float,
        metavar="X",
        help="share by which the perplexity of the text may grow, 0.01 for 1%%; as few matrices as that takes get more "
        "than --weight-bits",
    )
    auto.add_argument("--json", action="store_true", help="rules and sensitivities as JSON")
    auto.add_argument(
        "--changes", metavar="FILE", help="take the sensitivities of an earlier --json, for another target"
    )


def call(args: argparse.Namespace) -> int:
    progress = sys.stderr.isatty() if args.progress is None else args.progress
    if not args.auto:
        return _pack(args, progress)
    if args.text is None:
        raise ConfigError("--auto needs a text to measure on", "give --text FILE")
    if args.keep is not None:
        raise ConfigError("--auto finds the rules itself", "leave --keep out")
    if args.max_loss is not None and args.max_loss <= 0:
        raise ConfigError(f"--max-loss {args.max_loss:g} is not above 0", "16 bits lose nothing")
    return _find(args, progress)


def _pack(args: argparse.Namespace, progress: bool) -> int:
    from flexrun.core import format_bytes
    from flexrun.llm import LLM

    keep = None if args.keep is None else args.keep.split(",")
    options = {"dtype": args.dtype, "cache_dir": args.cache_dir, "disk_dir": args.disk_dir, "progress": progress}
    llm = LLM(args.model, weight_bits=args.weight_bits, keep=keep, **options)
    try:
        packed = llm.pack()
    finally:
        llm.close()
    nbytes = sum(entry.nbytes for entry in packed.entries.values())
    print(f"{packed.folder}: {format_bytes(nbytes)}", file=sys.stderr)
    return 0


def _find(args: argparse.Namespace, progress: bool) -> int:
    from tqdm import tqdm

    from flexrun.compress import GroupFormat, WeightBits
    from flexrun.config import Policy
    from flexrun.evals.sensitivity import average_bits, choose, matrices, meet, sensitivities
    from flexrun.llm import LLM

    low = GroupFormat(4)
    policy = Policy(sequences_in_flight=4, tokens_per_pass=2048, attention_micro_batch=4)  # all in RAM
    open_llm = partial(LLM, args.model, dtype=args.dtype, cache_dir=args.cache_dir, disk_dir=args.disk_dir)
    llm = open_llm(policy=policy, progress=progress)
    loss = None
    try:
        text = text_tokens(llm.tokenizer, args.text)[: args.limit], args.context
        if args.changes is None:
            total = sum(1 for _ in matrices(llm.spec))
            with tqdm(total=total, desc="matrices", unit="", disable=not progress, leave=False) as bar:
                found = sensitivities(llm, *text, low, bar.update)
        else:
            found = _read_changes(args.changes, llm.spec)
        if args.max_loss is None:
            base, more = GroupFormat(args.weight_bits), GroupFormat(8) if args.weight_bits == 4 else None
            rules = choose(found, args.target_bits or args.weight_bits + 1, base, more, llm.spec.dtype_bytes)
        else:
            with tqdm(desc="trials", unit="", disable=not progress, leave=False) as bar:
                rules, loss = meet(llm, *text, found, args.weight_bits, args.max_loss, bar.update)
        bits = average_bits(llm.spec, WeightBits(args.weight_bits, rules))
    finally:
        llm.close()
    if args.json:
        changes = {each.rule: each.change for each in found}
        values = {
            "weight_bits": args.weight_bits,
            "keep": rules,
            "average_bits": bits,
            "loss": loss,
            "changes": changes,
        }
        print(json.dumps(values, indent=2))
    else:
        print(",".join(rules))
        words = f"{len(rules)} of {len(found)} matrices take more bits, {bits:.2f} an element on average"
        lost = "" if loss is None else f"; the text's perplexity grows by {loss:.2%}"
        print(f"{words}{lost}; run with --weight-bits {args.weight_bits} --keep RULES", file=sys.stderr)
    return 0


def _read_changes(path: str, spec: ModelSpec) -> list[Sensitivity]:
    from flexrun.evals.sensitivity import from_changes

    try:
        changes = json.loads(Path(path).read_text(encoding="utf-8"))["changes"]
        return from_changes(spec, changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no sensitivities of this model: {error}", "name the output of an earlier --auto --json"
        ) from error
