"""Flags that commands share mean the same to each of them, and are arguments of flexrun.LLM."""

import inspect

import pytest

from flexrun import LLM
from flexrun.cli import bench, eval_perplexity, plan, run
from flexrun.cli.machine import MACHINE_FLAGS, MODEL_FLAGS, llm_arguments, weight_arguments
from flexrun.cli.parser import Parser

FILES = {run: ["-i", "in.jsonl", "-o", "out.jsonl"], eval_perplexity: ["--text", "book.txt"]}


def parse(command, *words):
    parser = Parser()
    command.add_flags(parser)
    return parser.parse_args(["--model", "m", *FILES.get(command, []), *words])


@pytest.mark.parametrize("command", [run, plan, bench])
def test_bits_of_weights(command):
    given = parse(command, "--weight-bits", "4", "--weight-group", "32", "--keep", "layers.0.*=16,*.down_proj=8")
    assert weight_arguments(parse(command, "--activation-bits", "8"))["activation_bits"] == 8
    assert weight_arguments(given) == {
        "weight_bits": 4,
        "weight_group": 32,
        "keep": ["layers.0.*=16", "*.down_proj=8"],
        "activation_bits": None,
        "kv_bits": None,
    }
    for words, bits in (("4", 4), ("16", 16), ("k8v4", "k8v4"), ("auto", "auto")):
        assert weight_arguments(parse(command, "--kv-bits", words))["kv_bits"] == bits
    with pytest.raises(SystemExit):
        parse(command, "--kv-bits", "k4v8")
    assert set(weight_arguments(parse(command)).values()) == {None}


@pytest.mark.parametrize("command", [bench, eval_perplexity])
def test_model_and_machine(command):
    arguments = llm_arguments(parse(command, "--max-model-len", "64", "--cpu-memory", "1GiB", "--threads", "2"))
    assert (arguments["max_model_len"], arguments["cpu_memory"], arguments["threads"]) == (64, "1GiB", 2)


def test_every_flag_is_an_argument_of_llm():
    names = {*MODEL_FLAGS, *MACHINE_FLAGS, *weight_arguments(parse(run))}
    assert names <= set(inspect.signature(LLM.__init__).parameters)
