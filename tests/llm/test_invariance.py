"""Where tensors live and what runs together never changes a token: the promise every policy search relies on."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_families import prompts

from flexrun import SamplingParams
from flexrun.config import Placement, Policy
from flexrun.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("matrices_move")
IN_RAM = Policy(sequences_in_flight=16, tokens_per_pass=1024, attention_micro_batch=16, token_micro_batch=1024)
PROPERTY = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def placements(draw, gpu: bool) -> Placement:
    parts = [draw(st.integers(0, 4)) * gpu, draw(st.integers(0, 4)), draw(st.integers(0, 4))]
    parts[1] += not sum(parts)
    total = sum(parts)
    return Placement(parts[0] / total, parts[1] / total, parts[2] / total)


@st.composite
def engines(draw, cpu_attention: bool = True, hidden_on_host: bool = False, experts: bool = False) -> dict:
    """Options of an LLM: a policy, and whether an accelerator is emulated, with attention and experts on the CPU beside
    it, and with hidden states of passes that are larger than it."""
    on_device = draw(st.booleans())
    hidden = st.sampled_from([0.0, 0.5, 1.0]) if on_device and hidden_on_host else st.just(1.0)
    on_gpu = draw(hidden)
    policy = Policy(
        sequences_in_flight=draw(st.integers(1, 7)),
        tokens_per_pass=draw(st.integers(1, 70)),
        attention_micro_batch=draw(st.integers(1, 4)),
        token_micro_batch=draw(st.integers(1, 40)),
        weights=draw(placements(on_device)),
        kv=draw(placements(on_device)),
        cpu_attention_share=draw(st.sampled_from([0.0, 0.5, 1.0])) * cpu_attention,
        kv_device_tokens_share=draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) * (on_device and cpu_attention),
        half_batches=draw(st.booleans()),
        expert_batch=draw(st.sampled_from([0, 1, 5])),
        hidden=Placement(on_gpu, 1.0 - on_gpu),
        cpu_experts_share=draw(st.sampled_from([0.0, 0.5, 1.0])) if experts else 0.0,
    )
    return {"policy": policy, "gpu_memory": "192MiB" if on_device else 0, "direct_io": draw(st.booleans())}


DENSE = ("llama", "gemma2_untied")
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("llama", 36),
        ("gemma2_untied", 28),
        ("deepseek_v2", 24),
        ("deepseek_v3", 12),
        ("gpt_oss", 24),
        ("mixtral", 24),
        ("glm4_moe_groups", 12),
    ],
)
def test_greedy_tokens_are_the_same_under_any_policy(run, assert_same_but_for_ties, name, examples):
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)

    @settings(PROPERTY, max_examples=examples)
    @given(
        engines("deepseek" not in name, hidden_on_host=name in DENSE, experts=name not in DENSE),
        lengths,
        st.integers(0, 3),
    )
    def check(engine, lengths, seed):
        asked = prompts(tuple(lengths), seed)
        expected = [output.outputs[0].token_ids for output in run(name, asked, greedy, policy=IN_RAM)]
        found = [output.outputs[0].token_ids for output in run(name, asked, greedy, **engine)]
        for prompt, tokens, other in zip(asked, expected, found, strict=True):
            assert len(other) == 10
            assert_same_but_for_ties(name, prompt, tokens, other)

    check()


@pytest.mark.parametrize(("name", "examples"), [("llama", 16), ("mixtral", 10), ("deepseek_v3", 6), ("gpt_oss", 6)])
def test_greedy_tokens_of_compressed_weights_are_the_same_too(run, name, examples):
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)

    @settings(PROPERTY, max_examples=examples)
    @given(
        engines("deepseek" not in name, experts=name not in DENSE),
        lengths,
        st.sampled_from([(4, ()), (8, ()), (4, ("*=8",))]),
    )
    def check(engine, lengths, bits):
        asked = prompts(tuple(lengths), 1)
        weights = {"weight_bits": bits[0], "keep": bits[1]}
        expected = [output.outputs[0].token_ids for output in run(name, asked, greedy, policy=IN_RAM, **weights)]
        found = [output.outputs[0].token_ids for output in run(name, asked, greedy, **engine, **weights)]
        assert found == expected

    check()


def test_latents_attended_on_the_cpu_beside_a_device_are_refused(run):
    (prompt,) = prompts((9,))
    with pytest.raises(UnsupportedError, match="attends latent KV on the CPU beside a GPU") as caught:
        run("deepseek_v2", [prompt], SamplingParams(max_tokens=2), policy=Policy(), gpu_memory="192MiB")
    assert "cpu_attention_share to 0" in caught.value.hint


def test_sampled_tokens_depend_on_the_seed_and_nothing_else(run):
    """The same request alone, in another order, beside others and under any policy: the same draw."""
    asked = prompts((7, 23, 1, 40, 12), 5)
    params = [
        SamplingParams(temperature=0.6 + 0.3 * number, top_k=20 * (number % 2), seed=number, max_tokens=9)
        for number in range(len(asked))
    ]
    expected = {}
    for number, prompt in enumerate(asked):
        (output,) = run("llama", [prompt], params[number], policy=IN_RAM)
        expected[number] = output.outputs[0].token_ids
    assert len({tuple(tokens) for tokens in expected.values()}) == len(asked)

    @settings(PROPERTY, max_examples=12)
    @given(engines(hidden_on_host=True), st.permutations(range(len(asked))), st.integers(1, len(asked)))
    def check(engine, order, count):
        chosen = order[:count]
        outputs = run("llama", [asked[number] for number in chosen], [params[number] for number in chosen], **engine)
        for number, output in zip(chosen, outputs, strict=True):
            assert output.outputs[0].token_ids == expected[number]

    check()


def test_another_seed_is_another_text(run):
    (prompt,) = prompts((9,))
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=12) for seed in (1, 2, 1)]
    first, second, again = (output.outputs[0].token_ids for output in run("llama", [prompt] * 3, params))
    assert first == again
    assert first != second


def test_the_job_seed_serves_requests_that_bring_none(run):
    (prompt,) = prompts((9,))
    params = SamplingParams(temperature=1.0, max_tokens=12)
    texts = [[o.outputs[0].token_ids for o in run("llama", [prompt] * 2, params, seed=seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0] != texts[0][1], "two requests of one job draw differently"


def test_choices_of_a_request_differ_and_repeat(run):
    (prompt,) = prompts((9,))
    params = SamplingParams(temperature=1.0, n=3, seed=4, max_tokens=12)
    (alone,) = run("llama", [prompt], params, policy=Policy(sequences_in_flight=2, tokens_per_pass=5))
    (beside, *_) = run("llama", [prompt, prompt[::-1]], params)
    assert [choice.index for choice in alone.outputs] == [0, 1, 2]
    assert [choice.token_ids for choice in alone.outputs] == [choice.token_ids for choice in beside.outputs]
    assert len({tuple(choice.token_ids) for choice in alone.outputs}) == 3
