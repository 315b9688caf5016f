"""Every family, end to end: LLM.generate with weights on disk gives the tokens of transformers in float32."""

from __future__ import annotations

import pytest
import torch
from tiny_families import ALL, VOCABULARY, prompts

from flexrun import SamplingParams
from flexrun.config import Placement, Policy

GENERATED_TOKENS = 64
LENGTHS = (5, 1, 23, 12)
POLICY = Policy(
    sequences_in_flight=3,  # fewer than the prompts: one takes a freed slot
    tokens_per_pass=16,
    attention_micro_batch=2,
    token_micro_batch=7,
    weights=Placement(cpu=0.5, disk=0.5),
)
LENGTH_DEPENDENT = {"rope_dynamic"}  # transformers itself answers differently with and without a cache


def greedy(model, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        result = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=GENERATED_TOKENS,
            eos_token_id=VOCABULARY,  # never generated
            pad_token_id=0,
        )
    return result[0, len(prompt) :].tolist()


@pytest.mark.usefixtures("matrices_move")
@pytest.mark.parametrize("name", [name for name in ALL if name not in LENGTH_DEPENDENT])
def test_greedy_tokens_equal_transformers(run, oracle, assert_same_but_for_ties, name):
    # transformers starts a longrope text with the short factors; flexrun takes those of the model's length throughout
    asked = prompts(tuple(max(length, 5) for length in LENGTHS) if name == "rope_longrope_long" else LENGTHS)
    params = SamplingParams(temperature=0, max_tokens=GENERATED_TOKENS, ignore_eos=True)
    outputs = run(name, asked, params, policy=POLICY)
    for number, (prompt, output) in enumerate(zip(asked, outputs, strict=True)):
        (choice,) = output.outputs
        assert choice.finish_reason == "length"
        assert len(choice.token_ids) == GENERATED_TOKENS
        if number < 2:  # with a cache, step by step
            assert_same_but_for_ties(name, prompt, greedy(oracle(name), prompt), choice.token_ids)
            continue
        with torch.inference_mode():  # the whole text at once: each token is the highest at its place
            logits = oracle(name)(torch.tensor([prompt + choice.token_ids[:-1]])).logits[0, len(prompt) - 1 :]
        assert_same_but_for_ties(name, prompt, logits.argmax(-1).tolist(), choice.token_ids)


@pytest.mark.parametrize("name", sorted(LENGTH_DEPENDENT))
def test_ropes_that_depend_on_length_equal_transformers(run, oracle, assert_same_but_for_ties, name):
    """One sequence at a time: transformers rescales with the longest of a batch."""
    (prompt,) = prompts((5,))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (output,) = run(name, [prompt], params, policy=POLICY)
    assert_same_but_for_ties(name, prompt, greedy(oracle(name), prompt)[:20], output.outputs[0].token_ids)
