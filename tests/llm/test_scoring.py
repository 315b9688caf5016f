"""Log-probabilities of prompts equal those of transformers, however a prompt is cut into passes and wherever KV is."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from tiny_families import prompts

from flexrun import SamplingParams
from flexrun.config import Placement, Policy
from flexrun.outputs import Request

CUT = Policy(sequences_in_flight=3, tokens_per_pass=7, attention_micro_batch=2, token_micro_batch=4)
AWAY = Policy(
    sequences_in_flight=6,
    tokens_per_pass=40,
    attention_micro_batch=2,
    weights=Placement(0.0, 1.0),
    kv=Placement(0.0, 1.0),
    cpu_attention_share=0.5,
)
SCORED = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=2)


@pytest.fixture(scope="module")
def reference(oracle):
    """reference(name, prompt) -> float64 [tokens - 1, vocab], log-probabilities of what follows each token."""

    def logprobs(name: str, prompt: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return oracle(name)(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(dim=-1)

    return logprobs


@pytest.mark.parametrize(
    "options", [{}, {"policy": CUT}, {"policy": AWAY, "gpu_memory": "4MiB"}], ids=["", "cut", "away"]
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "mixtral"])
def test_prompt_logprobs_equal_those_of_transformers(run, reference, name, options):
    if name == "mixtral" and "gpu_memory" in options:
        options = {**options, "gpu_memory": "16MiB"}
    asked = prompts((2, 17, 9, 5))
    for prompt, output in zip(asked, run(name, asked, SCORED, **options)):
        expected = reference(name, prompt)
        assert output.outputs[0].token_ids == [] and output.outputs[0].finish_reason == "length"
        first, *rest = output.prompt_logprobs
        assert first is None and len(rest) == len(expected)
        for token, found, row in zip(prompt[1:], rest, expected):
            assert math.isclose(found[token].logprob, row[token].item(), abs_tol=1e-4)
            assert found[token].rank == int((row > row[token]).sum()) + 1
            best = row.topk(2)
            likeliest = sorted(entry.logprob for key, entry in found.items() if entry.rank <= 2)
            assert numpy.allclose(likeliest, sorted(best.values.tolist())[-len(likeliest) :], atol=1e-4)


@pytest.mark.parametrize("policy", [None, CUT])
def test_a_prompt_may_be_scored_and_go_on(run, policy):
    asked, params = prompts((9, 3)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    plain = run("llama", asked, params, policy=policy)
    both = run("llama", asked, [SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=0)] * 2)
    alone = run("llama", asked, SCORED, policy=policy)
    for one, other, scored, prompt in zip(plain, both, alone, asked):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids and one.prompt_logprobs is None
        for token, found, known in zip(prompt[1:], other.prompt_logprobs[1:], scored.prompt_logprobs[1:]):
            assert math.isclose(found[token].logprob, known[token].logprob, abs_tol=1e-4)


def test_a_score_is_of_the_continuation_alone(open_llm, reference):
    llm = open_llm("llama", policy=CUT)
    (prompt,) = prompts((12,))
    expected = reference("llama", prompt)
    greedy = [
        *prompt,
        int(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1), False)[0].outputs[0].token_ids[0]),
    ]
    likely, part, whole = llm.score([greedy[:-1], prompt[:8], prompt[:1]], [greedy[-1:], prompt[8:], prompt[1:]], False)
    assert likely.is_greedy and likely.token_ids == greedy[-1:]
    for score, start in ((part, 8), (whole, 1)):
        own = expected[torch.arange(start - 1, 11), torch.tensor(prompt[start:])].tolist()
        assert score.token_ids == prompt[start:] and not score.is_greedy
        assert numpy.allclose(score.token_logprobs, own, atol=1e-4)
        assert math.isclose(score.logprob, math.fsum(own), abs_tol=1e-3)
    (alone,) = llm.score([prompt], use_tqdm=False)
    assert math.isclose(alone.logprob, whole.logprob, abs_tol=1e-4)


def test_what_cannot_be_scored_says_why_and_costs_the_others_nothing(open_llm):
    llm = open_llm("llama")
    single, empty, good = llm.score([[5], [], [5, 6]], use_tqdm=False)
    assert single.logprob == 0.0 and single.token_ids == []
    assert "empty" in str(empty.error) and math.isnan(empty.logprob)
    assert good.error is None and len(good.token_ids) == 1
    wide = Policy(
        sequences_in_flight=4, tokens_per_pass=64, token_micro_batch=8, attention_micro_batch=1,
        weights=Placement(0.0, 1.0), kv=Placement(0.0, 1.0), hidden=Placement(0.0, 1.0),
    )  # fmt: skip
    (refused,) = open_llm("llama", policy=wide, gpu_memory="4MiB").score([[5, 6, 7]], use_tqdm=False)
    assert "hidden" in str(refused.error)


def test_scored_tokens_are_planned_as_rows_of_the_head(open_llm):
    llm = open_llm("llama")
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    list(llm.generate_iter([Request(str(size), [7] * size, params=params) for size in (30, 20, 10)]))
    planned = llm.plan.layout
    workload = llm._intake.workload([Request("a", [7] * 30, params=params, score_start=20)])
    assert (workload.prompt_tokens, workload.max_tokens, workload.scored_tokens) == (29, 1, 9)
    assert planned.kv_tokens >= 29 and llm.summary()["prompt_tokens"] == 29 + 19 + 9


def test_a_text_one_token_longer_than_the_context_is_scored_whole(open_llm, reference):
    llm = open_llm("llama", max_model_len=20)
    asked = prompts((21, 20, 22))
    longest, shorter, refused = llm.score(asked, use_tqdm=False)
    assert refused.error is not None and refused.error.code == "context_length_exceeded"
    for prompt, score in ((asked[0], longest), (asked[1], shorter)):
        own = reference("llama", prompt)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        assert numpy.allclose(score.token_logprobs, own, atol=1e-4)
