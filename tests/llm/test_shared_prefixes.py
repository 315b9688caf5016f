"""What prompts begin with in common is run once and attended together, and no token changes by it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_families import prompts

from flexrun import SamplingParams
from flexrun.config import Placement, Policy

pytestmark = pytest.mark.usefixtures("matrices_move")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
IN_RAM = Policy(sequences_in_flight=16, tokens_per_pass=1024, attention_micro_batch=16, token_micro_batch=1024)
PROPERTY = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def family(header: int, shots: int, questions: int, seed: int = 0) -> list[list[int]]:
    """Prompts that share a header, every second one some shots behind it as well."""
    common, more, *rest = prompts((header, shots, *range(3, 3 + questions)), seed)
    return [common + (more if number % 2 else []) + question for number, question in enumerate(rest)]


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


@st.composite
def engines(draw) -> dict:
    """Policies with and without an emulated device, and KV anywhere: attended in place, staged, or beside a device."""
    on_device, on_disk = draw(st.booleans()), draw(st.sampled_from([0.0, 0.5]))
    homes = [Placement(0, 1), Placement(0, 0.5, 0.5), Placement(0, 0, 1)]
    homes += [Placement(1, 0), Placement(0.5, 0.5), Placement(0.3, 0.4, 0.3)] if on_device else []
    policy = Policy(
        sequences_in_flight=draw(st.integers(1, 7)),
        tokens_per_pass=draw(st.integers(1, 90)),
        attention_micro_batch=draw(st.integers(1, 4)),
        token_micro_batch=draw(st.integers(1, 40)),
        weights=Placement(0.5 * on_device * (1 - on_disk), (1 - on_disk) * (1 - 0.5 * on_device), on_disk),
        kv=draw(st.sampled_from(homes)),
        cpu_attention_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        half_batches=draw(st.booleans()),
    )
    return {"policy": policy, "gpu_memory": "192MiB" if on_device else 0}


@pytest.mark.parametrize(("name", "examples"), [("llama", 10), ("gemma2_untied", 5), ("gpt_oss", 5), ("mixtral", 2)])
def test_greedy_tokens_are_those_without_sharing(run, assert_same_but_for_ties, name, examples):
    """Also where windows end inside a prefix, with sinks and soft caps."""

    @settings(PROPERTY, max_examples=examples)
    @given(engines(), st.integers(16, 40), st.integers(16, 40), st.integers(2, 6), st.integers(1, 3))
    def check(engine, header, shots, questions, copies):
        asked = family(header, shots, questions) * copies
        expected = tokens_of(run(name, asked, GREEDY, policy=IN_RAM, shared_prefixes=False))
        found = tokens_of(run(name, asked, GREEDY, **engine))
        for prompt, (tokens,), (other,) in zip(asked, expected, found, strict=True):
            assert len(other) == GREEDY.max_tokens
            assert_same_but_for_ties(name, prompt, tokens, other)

    check()


def test_a_prefix_is_run_once(open_llm):
    asked = family(40, 20, 8)
    llm = open_llm("llama", policy=IN_RAM)
    llm.generate(asked, GREEDY, use_tqdm=False)
    totals = llm._engine.totals
    assert totals.prompt_tokens == 60 + sum(range(3, 11)) and totals.spared_tokens == 8 * 40 + 4 * 20 - 60
    assert llm.summary()["shared_prefixes"] == {"prefixes": 2, "spared_prompt_tokens": 340}


def test_choices_of_a_prompt_share_all_but_its_last_token(open_llm):
    asked = prompts((50, 30))
    llm = open_llm("llama", policy=IN_RAM)
    outputs = llm.generate(asked, dataclasses.replace(GREEDY, n=8, temperature=1.0, seed=3), use_tqdm=False)
    assert llm._engine.totals.prompt_tokens == 49 + 29 + 16
    apart = open_llm("llama", policy=IN_RAM, shared_prefixes=False)
    again = apart.generate(asked, dataclasses.replace(GREEDY, n=8, temperature=1.0, seed=3), use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(again)
    assert apart._engine.totals.spared_tokens == 0 and apart.summary()["shared_prefixes"]["prefixes"] == 0


def test_prefixes_make_room_for_others(open_llm):
    """Many groups, and slots for two sequences: room is reserved for few prefixes, and given on."""
    asked = [prompt for seed in range(6) for prompt in family(20 + seed, 16, 3, seed)]
    slots = dataclasses.replace(IN_RAM, sequences_in_flight=2, tokens_per_pass=33)
    llm = open_llm("llama", policy=slots)
    found = tokens_of(llm.generate(asked, GREEDY, use_tqdm=False))
    assert llm._engine.prefix_tokens < 20 * 6
    assert llm._engine.totals.spared_tokens == sum(2 * (20 + seed) for seed in range(6))
    assert found == tokens_of(open_llm("llama", policy=slots, shared_prefixes=False).generate(asked, GREEDY, False))


def test_scores_share_their_contexts(open_llm):
    """Choices of a question: the same text, several continuations."""
    context, *endings = prompts((48, 3, 7, 4))
    shared, apart = open_llm("llama", policy=IN_RAM), open_llm("llama", policy=IN_RAM, shared_prefixes=False)
    found = shared.score([context] * 3, endings, use_tqdm=False)
    expected = apart.score([context] * 3, endings, use_tqdm=False)
    assert shared._engine.totals.prompt_tokens == 47 + 3 + 7 + 4  # the last token of the context predicts
    for one, other in zip(found, expected):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4) and one.token_ids == other.token_ids
    whole = [context + ending for ending in endings]
    assert [score.logprob for score in shared.score(whole, use_tqdm=False)] == pytest.approx(
        [score.logprob for score in apart.score(whole, use_tqdm=False)], abs=1e-3
    )


def test_prompts_that_are_echoed_are_run_as_a_whole(open_llm):
    asked = family(30, 16, 4)
    llm = open_llm("llama", policy=IN_RAM)
    outputs = llm.generate(asked, dataclasses.replace(GREEDY, prompt_logprobs=0), use_tqdm=False)
    assert llm._engine.totals.spared_tokens == 0
    assert [len(output.prompt_logprobs) for output in outputs] == list(map(len, asked))


@pytest.mark.parametrize(
    ("name", "changes", "device"),
    [
        ("deepseek_v2", {}, 0),
        ("llama", {"kv_device_tokens_share": 0.5}, 1),
        ("llama", {"hidden": Placement(0, 1), "kv": Placement(1, 0), "token_micro_batch": 8}, 1),
    ],
    ids=["latents", "KV split by token", "hidden states on the host"],
)
def test_what_cannot_share_runs_without(open_llm, name, changes, device):
    asked = family(30, 16, 6)
    policy = Policy(sequences_in_flight=4, tokens_per_pass=64, attention_micro_batch=2, **changes)
    llm = open_llm(name, policy=policy, gpu_memory="192MiB" if device else 0)
    found = tokens_of(llm.generate(asked, GREEDY, use_tqdm=False))
    assert llm._engine.totals.spared_tokens == 0 and llm._engine.prefix_tokens == 0
    assert found == tokens_of(open_llm(name, policy=IN_RAM, shared_prefixes=False).generate(asked, GREEDY, False))


def test_an_engine_serves_another_job_with_other_prefixes(open_llm):
    llm = open_llm("llama", policy=IN_RAM)
    apart = open_llm("llama", policy=IN_RAM, shared_prefixes=False)
    for seed in range(3):
        asked = family(40 - seed, 20, 6, seed)
        assert tokens_of(llm.generate(asked, GREEDY, False)) == tokens_of(apart.generate(asked, GREEDY, False))
    assert llm._engine.totals.spared_tokens > 3 * 5 * 38
    forecasts = llm.summary()["forecast"]
    assert forecasts["as_it_came"]["prompt_tokens"] == llm._engine.totals.prompt_tokens
