"""Flags that several commands share: of the model, of what it runs on, and of the bits of its weights and KV cache."""

from __future__ import annotations

import argparse
from typing import Any

MODEL_FLAGS = ("tokenizer", "dtype", "max_model_len", "cache_dir", "expert_profile")
MACHINE_FLAGS = (
    "gpu_memory",
    "cpu_memory",
    "disk_memory",
    "disk_dir",
    "max_num_seqs",
    "device",
    "threads",
    "hardware",
)


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--model and a flag for each of MODEL_FLAGS, arguments of flexrun.LLM and open_model. Returns their group."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="NAME", help="directory, .gguf file or known model name")
    model.add_argument("--tokenizer", metavar="PATH", help="tokenizer directory or file, if not the model's own")
    model.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    model.add_argument("--max-model-len", type=int, metavar="TOKENS", help="most tokens of prompt and answer together")
    model.add_argument("--cache-dir", metavar="DIR", help="where fetched models and packed weights are kept")
    model.add_argument(
        "--expert-profile", metavar="FILE", help="tokens by expert of an earlier run: the busiest live on fast tiers"
    )
    return model


def add_machine_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """A flag for each of MACHINE_FLAGS, arguments of flexrun.LLM. Returns their group."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--hardware", metavar="FILE", help="profile to plan by; default: this machine, measured once")
    machine.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    machine.add_argument("--gpu-memory", metavar="SIZE", help="budget; on cpu, an emulated accelerator")
    machine.add_argument("--cpu-memory", metavar="SIZE", help="budget of host memory, for example 8GiB")
    machine.add_argument("--disk-memory", metavar="SIZE", help="budget of disk for both; default: what is free there")
    machine.add_argument("--disk-dir", metavar="DIR", help="where weights and KV cache are streamed from")
    machine.add_argument("--max-num-seqs", type=int, metavar="COUNT", help="sequences in flight")
    machine.add_argument("--threads", type=int, metavar="COUNT", help="threads that compute")
    return machine


def add_weight_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of `weight_arguments`."""
    group.add_argument(
        "--weight-bits",
        type=_bits,
        metavar="4|8|16|auto",
        help="compress the matrices; auto: as far as that saves time, 4 bits for a tenth of it; default: do not",
    )
    group.add_argument(
        "--weight-group", type=int, choices=(32, 64, 128), help="weights that share a scale; default: 64"
    )
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=(8, 16),
        help="round what compressed matrices are multiplied by, on a CPU; default: do not",
    )
    group.add_argument("--keep", metavar="RULES", help="other bits for some, as in layers.0.*=16,*.down_proj=8")
    group.add_argument(
        "--kv-bits",
        type=_kv_bits,
        metavar="4|8|16|k8v4|auto",
        help="compress the KV cache; auto: as far as that saves time, 4 bits for a tenth of it; default: do not",
    )


def weight_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What --weight-bits, --weight-group, --activation-bits, --keep and --kv-bits say, as arguments of flexrun.LLM or
    fields of a Policy; None: not given."""
    keep = None if args.keep is None else args.keep.split(",")
    given = {name: getattr(args, name) for name in ("weight_bits", "weight_group", "activation_bits", "kv_bits")}
    return {**given, "keep": keep}


def bits_in_force(args: argparse.Namespace) -> dict[str, Any]:
    """The same as words of the command line, and where it has none, those of the --policy file that are no defaults.

    Raises ConfigError where the file is no policy.
    """
    names = ("weight_bits", "weight_group", "activation_bits", "kv_bits", "keep")
    given = {name: getattr(args, name) for name in names}
    if args.policy in (None, "auto"):
        return given
    from flexrun.config import Policy

    policy, default = Policy.from_json(args.policy), Policy()
    found = {name: getattr(policy, name) for name in names if getattr(policy, name) != getattr(default, name)}
    if "keep" in found:
        found["keep"] = ",".join(policy.keep)
    return {name: found.get(name) if value is None else value for name, value in given.items()}


def prefix_unit(kv_bits: int | str | None) -> int:
    """Tokens of which shared prefixes are to be whole multiples: of a cache that may be compressed, its groups."""
    if kv_bits in (None, 16):
        return 1
    from flexrun.compress import GROUP_TOKENS

    return GROUP_TOKENS


def _kv_bits(text: str) -> int | str:
    value = int(text) if text.isdecimal() else text
    from flexrun.config import KV_BITS  # here: it brings torch, and --help is to be quick

    if value not in (*KV_BITS, "auto"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, KV_BITS))}, auto")
    return value


def _bits(text: str) -> int | str:
    if text not in ("4", "8", "16", "auto"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of 4, 8, 16 and auto")
    return text if text == "auto" else int(text)


def llm_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of model and machine say, as arguments of flexrun.LLM."""
    return {name: getattr(args, name) for name in (*MODEL_FLAGS, *MACHINE_FLAGS)}
