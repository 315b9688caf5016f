"""Experts that the CPU runs where they lie, beside a device: the same tokens, and no weights that cross the link."""

from __future__ import annotations

import dataclasses
from contextlib import closing

import pytest
from tiny_families import prompts

from flexrun import SamplingParams
from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier, align_up

pytestmark = pytest.mark.usefixtures("matrices_move")
IN_RAM = Policy(sequences_in_flight=16, tokens_per_pass=1024, attention_micro_batch=16, token_micro_batch=1024)
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
THREE_TIERS = Policy(
    sequences_in_flight=6,
    tokens_per_pass=50,
    attention_micro_batch=2,
    token_micro_batch=7,
    expert_batch=3,
    weights=Placement(0.3, 0.4, 0.3),
    kv=Placement(1.0, 0.0, 0.0),
)


def same_tokens(run, assert_same_but_for_ties, name: str, policy: Policy, **options) -> None:
    asked = prompts((5, 1, 23, 40, 12, 3))
    expected = [output.outputs[0].token_ids for output in run(name, asked, GREEDY, policy=IN_RAM)]
    found = [output.outputs[0].token_ids for output in run(name, asked, GREEDY, policy=policy, **options)]
    for prompt, tokens, other in zip(asked, expected, found, strict=True):
        assert_same_but_for_ties(name, prompt, tokens, other)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])  # gpt-oss's experts have biases
def test_tokens_do_not_depend_on_who_runs_an_expert(run, assert_same_but_for_ties, name, share):
    policy = dataclasses.replace(THREE_TIERS, cpu_experts_share=share)
    same_tokens(run, assert_same_but_for_ties, name, policy, gpu_memory="192MiB")


def test_experts_and_attention_share_the_cpu_in_both_halves(run, assert_same_but_for_ties):
    changes = {"kv": Placement(0.34, 0.66, 0.0), "half_batches": True, "weights": Placement(0.0, 1.0, 0.0)}
    policy = dataclasses.replace(THREE_TIERS, cpu_experts_share=0.6, **changes)
    same_tokens(run, assert_same_but_for_ties, "mixtral", policy, gpu_memory="192MiB")


@pytest.mark.parametrize("bits", [8, 4])
def test_compressed_experts_run_where_they_lie(run, bits):
    asked, options = prompts((5, 23, 12)), {"weight_bits": bits, "gpu_memory": "192MiB"}
    texts = [
        [output.outputs[0].token_ids for output in run("mixtral", asked, GREEDY, policy=policy, **options)]
        for policy in (THREE_TIERS, dataclasses.replace(THREE_TIERS, cpu_experts_share=1.0))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_experts_that_the_cpu_runs_never_cross_the_link(open_llm, tmp_path, share):
    policy = dataclasses.replace(
        THREE_TIERS, tokens_per_pass=100, weights=Placement(0.0, 1.0, 0.0), cpu_experts_share=share
    )
    with closing(open_llm("mixtral", policy=policy, gpu_memory="192MiB", trace=tmp_path / "trace.json")) as llm:
        llm.generate(prompts((20,) * 6), GREEDY, use_tqdm=False)
        weights, passes = llm._engine.weights, llm.summary()["passes"]
        placed = weights.placement.tensors
        of_experts = [item for item in placed if item.tensor.module == "experts"]
        by_cpu = [item for item in of_experts if item.stays]
        assert len(by_cpu) == share * len(of_experts) == sum(len(weights.cpu_experts(n)[1]) for n in range(99))
        assert {item.tier for item in by_cpu} <= {Tier.CPU}
        moved = sum(align_up(item.nbytes) for item in placed if item.tier is Tier.CPU and not item.stays)
        embedding = sum(align_up(item.nbytes) for item in placed if item.layer < 0 and item.tier is Tier.CPU)
        events = llm._engine.events
        copied = sum(event.bytes for event in events if event.name == "copy_weights")
        assert copied <= (passes + 1) * (moved - embedding), "and a little is copied ahead of a pass that never comes"
        ran = [event for event in events if event.name == "experts" and event.lane is Lane.CPU]
        there, back = (
            [event for event in events if event.name == name] for name in ("offload_normed", "return_routed")
        )
        assert len(ran) == len(there) == len(back) == (passes * llm.spec.num_layers if share else 0)
        assert {event.lane for event in (*there, *back)} <= {Lane.D2H, Lane.H2D}


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("weights", [Placement(0.25, 0.5, 0.25), Placement(0.0, 1.0, 0.0)], ids=["mixed", "in RAM"])
def test_an_engine_holds_what_its_account_says(open_llm, weights, bits):
    policy = dataclasses.replace(THREE_TIERS, weights=weights, cpu_experts_share=0.5, weight_bits=bits)
    llm = open_llm("mixtral", policy=policy, gpu_memory="192MiB")
    llm.generate(prompts((20,) * 6), GREEDY, use_tqdm=False)
    account = llm.plan.layout.account
    for tier, memory in llm._engine.tiers.items():
        told = {kind: size for kind, size in account.bytes_by_kind[tier].items() if size}
        assert {kind: size for kind, size in memory.used_by_kind.items() if size} == told
        assert memory.peak_bytes == account.total(tier)
        assert "cpu_experts" in told


@pytest.mark.parametrize(("name", "gpu_memory"), [("mixtral", 0), ("llama", "192MiB")], ids=["no device", "no experts"])
def test_a_share_of_nothing_is_nothing(run, open_llm, name, gpu_memory):
    policy = Policy(weights=Placement(0.0, 0.5, 0.5), cpu_experts_share=1.0)
    llm = open_llm(name, policy=policy, gpu_memory=gpu_memory)
    llm.generate(prompts((5,)), SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert llm.plan.layout.placement.cpu_experts == 0
    assert all("cpu_experts" not in kinds for kinds in llm.plan.layout.account.bytes_by_kind.values())
