"""A latent cache takes the bytes that the plan says, on every tier."""

from __future__ import annotations

import pytest

from flexrun.config import Placement, Policy
from flexrun.core import Tier


@pytest.mark.usefixtures("matrices_move")
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3_dense", "gpt_oss"])
@pytest.mark.parametrize("gpu_memory", [0, "192MiB"], ids=["RAM and disk", "three tiers"])
def test_an_engine_holds_what_its_account_says(open_llm, name, gpu_memory):
    on_gpu = 0.25 if gpu_memory else 0.0
    policy = Policy(
        sequences_in_flight=8,
        tokens_per_pass=50,
        attention_micro_batch=2,
        token_micro_batch=20,
        weights=Placement(on_gpu, 0.75 - on_gpu, 0.25),
        kv=Placement(on_gpu, 0.75 - on_gpu, 0.25),
        cpu_attention_share=0.0,
    )
    llm = open_llm(name, policy=policy, gpu_memory=gpu_memory)
    llm.prepare()
    engine, account = llm._engine, llm.plan.layout.account
    for tier, memory in engine.tiers.items():
        told = {kind: size for kind, size in account.bytes_by_kind[tier].items() if size}
        assert {kind: size for kind, size in memory.used_by_kind.items() if size} == told
    elements = {"deepseek_v2": 30, "deepseek_v3_dense": 30, "gpt_oss": 2 * 2 * 10}[name]
    places = engine.kv.micro_batches
    in_memory = [index for index, place in enumerate(places) if place.home is not Tier.DISK]
    assert {engine.kv.slab(0, index)[:, 0].numel() for index in in_memory} == {elements}
