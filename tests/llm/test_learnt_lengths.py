"""A cache without room for the worst case: more sequences run at once, some are paused, and no token changes."""

from __future__ import annotations

import random

import pytest

from flexrun import LLM, SamplingParams
from flexrun.config import Placement, Policy
from flexrun.offload import likely_lengths

LIMIT = 60  # tokens an answer may have


@pytest.fixture(scope="module")
def requests(checkpoint, packed_cache):
    """(prompts, params): most answers end after a few tokens, by a stop token of their own; some go to the limit."""
    draw = random.Random(4)
    prompts = [[draw.randrange(3, 90) for _ in range(draw.randint(2, 9))] for _ in range(120)]
    free = SamplingParams(temperature=0.0, max_tokens=LIMIT, ignore_eos=True)
    with LLM(checkpoint("llama"), dtype="float32", disk_dir=packed_cache, cpu_memory="256MiB", threads=1) as llm:
        answers = [output.outputs[0].token_ids for output in llm.generate(prompts, free, use_tqdm=False)]
    params = []
    for number, answer in enumerate(answers):
        stops = () if number % 30 == 7 else (answer[draw.randint(0, 8)],)
        sampled = {"temperature": 0.7, "seed": number, "n": 2} if number % 40 == 3 else {"temperature": 0.0}
        params.append(SamplingParams(max_tokens=LIMIT, stop_token_ids=stops, ignore_eos=True, **sampled))
    return prompts, params


@pytest.fixture
def run(checkpoint, packed_cache, requests):
    """run(**fields of the policy) -> (token ids of all choices of each request, summary)."""

    def run(prompts=None, params=None, device_memory=None, **fields):
        prompts, params = prompts or requests[0], params or requests[1]
        policy = Policy(tokens_per_pass=128, attention_micro_batch=12, **fields)
        options = {"dtype": "float32", "disk_dir": packed_cache, "cpu_memory": "256MiB", "threads": 1}
        options["gpu_memory"] = device_memory
        with LLM(checkpoint("llama"), policy=policy, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert all(output.error is None for output in outputs)
            free = llm._engine.kv.free_tokens
            assert free == sum(place.capacity_tokens for place in llm._engine.kv.micro_batches), "room was lost"
            return [[choice.token_ids for choice in output.outputs] for output in outputs], llm.summary()

    return run


def test_no_token_changes_and_more_run_at_once(run, monkeypatch):
    expected, roomy = run(sequences_in_flight=24)
    assert roomy["paused_sequences"] == 0
    found, learnt = run(sequences_in_flight=24, kv_tokens=420)  # of 24 times up to 68
    assert found == expected
    assert learnt["paused_sequences"] > 0
    monkeypatch.setattr(likely_lengths, "LEAST_ANSWERS", 10**9)  # nothing is learnt: the worst case is kept for all
    found, cautious = run(sequences_in_flight=24, kv_tokens=420)
    assert found == expected and cautious["paused_sequences"] == 0
    assert learnt["passes"] < 0.8 * cautious["passes"]


@pytest.mark.parametrize(
    "fields",
    [
        {"kv": Placement(0.0, 0.0, 1.0)},
        {"kv": Placement(0.5, 0.5), "device_memory": "8MiB"},
        {"kv": Placement(0.0, 1.0), "kv_device_tokens_share": 0.4, "device_memory": "8MiB"},
        {"kv_bits": 8},
    ],
    ids=["on disk", "in two tiers", "split by token", "in 8 bits"],
)
def test_wherever_the_cache_is(run, monkeypatch, fields):
    monkeypatch.setattr(likely_lengths, "SURE", 0.5)
    expected, _ = run(sequences_in_flight=12, **fields)
    found, summary = run(sequences_in_flight=12, kv_tokens=280, **fields)
    assert found == expected
    assert (summary["paused_sequences"] > 0) != ("kv_bits" in fields)


@pytest.mark.parametrize("sure", [0.01, 0.5])
def test_bad_guesses_cost_time_only(run, monkeypatch, sure):
    expected, _ = run(sequences_in_flight=24)
    monkeypatch.setattr(likely_lengths, "SURE", sure)
    monkeypatch.setattr(likely_lengths, "LEAST_ANSWERS", 1)
    found, summary = run(sequences_in_flight=24, kv_tokens=200)
    assert found == expected and summary["paused_sequences"] > 10
    assert summary["generated_tokens"] == sum(len(tokens) for choices in expected for tokens in choices)


def test_scored_prompts_are_scored_once(run, requests, monkeypatch):
    monkeypatch.setattr(likely_lengths, "SURE", 0.01)
    monkeypatch.setattr(likely_lengths, "LEAST_ANSWERS", 1)
    params = [
        SamplingParams(temperature=0.0, max_tokens=0 if number % 3 else 20, ignore_eos=True, prompt_logprobs=0)
        for number in range(len(requests[0]))
    ]
    expected, _ = run(params=params, sequences_in_flight=24)
    found, summary = run(params=params, sequences_in_flight=24, kv_tokens=200)
    assert found == expected and summary["paused_sequences"] == 0
