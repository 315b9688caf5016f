"""Flags of what a model runs on, for the commands that open one to try it."""

from __future__ import annotations

import argparse
from typing import Any

LLM_FLAGS = (
    "tokenizer",
    "dtype",
    "gpu_memory",
    "cpu_memory",
    "disk_memory",
    "disk_dir",
    "cache_dir",
    "max_num_seqs",
    "device",
    "threads",
    "hardware",
)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each of LLM_FLAGS, the arguments of flexrun.LLM."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--tokenizer", metavar="PATH", help="tokenizer directory or file, if not the model's own")
    machine.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    machine.add_argument("--cache-dir", metavar="DIR", help="where fetched models and packed weights are kept")
    machine.add_argument("--disk-dir", metavar="DIR", help="where weights and KV cache are streamed from")
    machine.add_argument("--hardware", metavar="FILE", help="profile to plan by; default: this machine, measured once")
    machine.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    machine.add_argument("--gpu-memory", metavar="SIZE", help="budget; on cpu, an emulated accelerator")
    machine.add_argument("--cpu-memory", metavar="SIZE", help="budget of host memory, for example 8GiB")
    machine.add_argument("--disk-memory", metavar="SIZE", help="budget of disk; default: what is free there")
    machine.add_argument("--max-num-seqs", type=int, metavar="COUNT", help="sequences in flight")
    machine.add_argument("--threads", type=int, metavar="COUNT", help="threads that compute")


def llm_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as arguments of flexrun.LLM."""
    return {name: getattr(args, name) for name in LLM_FLAGS}
