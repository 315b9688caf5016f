"""Whole models behind LLM, and the rule by which two runs of one model may differ: a tie closer than rounding."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
import transformers
from tiny_families import EAGER

from flexrun import LLM, SamplingParams

TIE_MARGIN = 1e-4  # logits closer than this may change places by rounding


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def open_llm(checkpoint, packed_cache):
    """open_llm(family name, **options) -> LLM in float32 on one thread; closed when the test ends."""
    opened = []

    def build(name: str, **options) -> LLM:
        options = {"dtype": "float32", "threads": 1, "cpu_memory": "256MiB", "disk_dir": packed_cache, **options}
        opened.append(LLM(checkpoint(name), **options))
        return opened[-1]

    yield build
    for llm in opened:
        llm.close()


@pytest.fixture
def run(open_llm):
    """run(name, prompts, params, **options) -> RequestOutputs of one LLM that lives for the call."""

    def generate(name: str, prompts, params: SamplingParams | list[SamplingParams], **options):
        with closing(open_llm(name, **options)) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [output.error for output in outputs] == [None] * len(outputs)
        return outputs

    return generate


@pytest.fixture(scope="session")
def oracle(checkpoint):
    """oracle(name) -> the transformers model of a checkpoint, in float32."""
    loaded = {}

    def load(name: str):
        if name not in loaded:
            loaded[name] = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint(name), dtype=torch.float32, **EAGER
            ).eval()
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def assert_same_but_for_ties(oracle):
    """assert_same_but_for_ties(name, prompt, tokens, other): equal, or parted by two logits within rounding."""

    def check(name: str, prompt: list[int], tokens: list[int], other: list[int]) -> None:
        if tokens == other:
            return
        step = next(step for step, pair in enumerate(zip(tokens, other)) if pair[0] != pair[1])
        with torch.no_grad():
            logits = oracle(name)(torch.tensor([prompt + tokens[:step]])).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        candidates = set(logits.topk(2).indices.tolist())
        assert first - second < TIE_MARGIN and {tokens[step], other[step]} == candidates, (
            f"{name}: step {step} of a prompt of {len(prompt)} gives {tokens[step]} here and {other[step]} there, "
            f"and the margin of the two highest logits is {first - second:.2e}"
        )

    return check
