"""A cache without room for the worst case: more sequences run at once, some are paused, and no token changes."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy
import pytest

from flexrun import LLM, SamplingParams
from flexrun.config import Placement, Policy
from flexrun.offload import likely_lengths
from flexrun.outputs import Request
from flexrun.workload import Workload

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

    def run(prompts=None, params=None, device_memory=None, shared_prefixes=True, **fields):
        prompts, params = prompts or requests[0], params or requests[1]
        policy = Policy(tokens_per_pass=128, attention_micro_batch=12, **fields)
        options = {"dtype": "float32", "disk_dir": packed_cache, "cpu_memory": "256MiB", "threads": 1}
        options |= {"gpu_memory": device_memory, "shared_prefixes": shared_prefixes}
        with LLM(checkpoint("llama"), policy=policy, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert all(output.error is None for output in outputs)
            free = llm._engine.kv.free_tokens
            assert free == sum(place.capacity_tokens for place in llm._engine.kv.micro_batches if not place.shared), (
                "room was lost"
            )
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


def test_what_shares_a_prefix_is_paused_and_resumed_behind_it(run, requests, monkeypatch):
    """One that is paused lets go of its prefix, which may be dropped and run again meanwhile."""
    draw = random.Random(5)
    headers = [[draw.randrange(3, 90) for _ in range(40)] for _ in range(4)]
    prompts = [headers[number % 4] + prompt for number, prompt in enumerate(requests[0][:60])]
    free = SamplingParams(temperature=0.0, max_tokens=LIMIT, ignore_eos=True)
    answers, _ = run(prompts, [free] * len(prompts), sequences_in_flight=24)
    params = [
        free if number % 10 == 3 else replace(free, stop_token_ids=(tokens[number % 9],))
        for number, (tokens,) in enumerate(answers)
    ]
    expected, apart = run(prompts, params, sequences_in_flight=24, shared_prefixes=False)
    assert apart["shared_prefixes"]["prefixes"] == 0
    monkeypatch.setattr(likely_lengths, "SURE", 0.5)
    monkeypatch.setattr(likely_lengths, "LEAST_ANSWERS", 4)
    found, shared = run(prompts, params, sequences_in_flight=24, kv_tokens=300)
    assert found == expected
    assert shared["paused_sequences"] > 10 and shared["shared_prefixes"]["prefixes"] >= 4
    assert shared["prompt_tokens"] < 0.6 * apart["prompt_tokens"]


@pytest.mark.parametrize("kept", [1, 9])
def test_room_for_what_is_likely_is_planned_and_a_bad_guess_only_pauses(checkpoint, packed_cache, requests, kept):
    """As a resumed job does it, which has learnt from the answers of before."""
    prompts, params = requests
    single = [replace(each, n=1, temperature=0.0) for each in params]
    lengths = [len(prompt) for prompt in prompts]
    most = Workload.of(lengths, [LIMIT] * len(prompts))
    known = numpy.full(len(prompts), kept)
    policy = Policy(tokens_per_pass=128, attention_micro_batch=24, sequences_in_flight=24)
    found = {}
    for name, workload in (("most", most), ("likely", replace(most, likely_tokens=known, kept_tokens=known))):
        asked = [
            Request(str(number), prompt, params=each, kept_tokens=kept if name == "likely" else None)
            for number, (prompt, each) in enumerate(zip(prompts, single))
        ]
        options = {"dtype": "float32", "disk_dir": packed_cache, "cpu_memory": "256MiB", "threads": 1}
        with LLM(checkpoint("llama"), policy=policy, **options) as llm:
            outputs = {output.request_id: output for output in llm.generate_iter(asked, workload)}
            assert not any(output.error for output in outputs.values())
            found[name] = [outputs[str(number)].outputs[0].token_ids for number in range(len(prompts))]
            room, paused, planned = llm._engine.kv_tokens, llm.summary()["paused_sequences"], llm.plan.forecast
        if name == "likely":
            assert room < 24 * (9 + kept) and paused > 0 and planned.generated_tokens == kept * len(prompts)
        else:
            assert room > 24 * LIMIT and paused == 0
    assert found["likely"] == found["most"]
