"""A sequence that goes on from tokens of an earlier run ends as if it had never stopped."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_families import prompts

from flexrun import SamplingParams
from flexrun.config import Placement, Policy
from flexrun.outputs import Request

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
CUT = Policy(sequences_in_flight=3, tokens_per_pass=7, attention_micro_batch=2, token_micro_batch=4)
AWAY = Policy(
    sequences_in_flight=6, tokens_per_pass=40, attention_micro_batch=2, weights=Placement(0, 1), kv=Placement(0, 1)
)


def answers(llm, requests) -> dict[str, list[list[int]]]:
    outputs = list(llm.generate_iter(requests))
    assert [output.error for output in outputs] == [None] * len(outputs)
    return {output.request_id: [choice.token_ids for choice in output.outputs] for output in outputs}


@pytest.mark.parametrize(
    "options", [{}, {"policy": CUT}, {"policy": AWAY, "gpu_memory": "4MiB"}], ids=["", "cut", "away"]
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_greedy_answers_go_on_unchanged(open_llm, assert_same_but_for_ties, name, options):
    llm, asked = open_llm(name, **options), prompts((3, 11, 6, 9, 2))
    whole = answers(llm, [Request(str(row), prompt, params=GREEDY) for row, prompt in enumerate(asked)])
    begun = [
        Request(str(row), prompt, params=GREEDY, partial={0: whole[str(row)][0][: 3 * row]})
        for row, prompt in enumerate(asked)
    ]
    for row, (tokens,) in answers(llm, begun).items():
        assert_same_but_for_ties(name, asked[int(row)], whole[row][0], tokens)
        assert tokens[: 3 * int(row)] == whole[row][0][: 3 * int(row)]


def test_drawn_choices_go_on_each_by_itself(open_llm):
    llm, prompt = open_llm("llama"), prompts((6,))[0]
    params = SamplingParams(temperature=1.0, n=3, seed=5, max_tokens=8, ignore_eos=True, repetition_penalty=1.3)
    (whole,) = answers(llm, [Request("a", prompt, params=params)]).values()
    partial = {0: whole[0][:4], 2: whole[2]}  # one half done, one not begun, one done
    tokens = []
    outputs = llm.generate_iter([Request("a", prompt, params=params, partial=partial)], on_tokens=tokens.append)
    (output,) = outputs
    assert [choice.token_ids for choice in output.outputs] == whole
    made = [entry for entries in tokens for entry in entries]
    assert sorted(made) == sorted(
        ("a", choice, token) for choice, start in ((0, 4), (1, 0)) for token in whole[choice][start:]
    )


def test_an_answer_that_was_whole_needs_no_pass(open_llm):
    llm, prompt = open_llm("llama"), prompts((6,))[0]
    (whole,) = answers(llm, [Request("a", prompt, params=GREEDY)]).values()
    passes = llm.summary()["passes"]
    assert answers(llm, [Request("a", prompt, params=GREEDY, partial={0: whole[0]})])["a"] == whole
    stops = dataclasses.replace(GREEDY, stop_token_ids=(whole[0][5],))
    (output,) = llm.generate_iter([Request("a", prompt, params=stops, partial={0: whole[0][:6]})])
    assert output.outputs[0].finish_reason == "stop" and llm.summary()["passes"] == passes
